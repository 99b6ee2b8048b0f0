"""The model card of a published LFM2-VL: what `card.py` adds to its own values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optimum_lfm2.file_names import DECODER, EMBEDDING, VISION
from optimum_lfm2.publish.precisions import PRECISIONS, Published
from optimum_lfm2.publish.table import Column, file_table
from optimum_lfm2.report import megabytes


def _of(part: str) -> Column:
    """Return the column for the difference of a part's file from transformers."""

    def cell(file: Published) -> str:
        name = PRECISIONS[file.precision].named(part)
        return next(f"{one.difference:.2g}" for one in file.all if one.path.name == name)

    return "checked within", cell


COLUMNS: tuple[Column, ...] = (
    ("precision", lambda file: file.precision),
    ("suffix", lambda file: f"`{suffix}`" if (suffix := PRECISIONS[file.precision].suffix) else "none"),
    ("MB", lambda file: megabytes(file.size)),
    ("decoder", lambda file: PRECISIONS[file.precision].weights),
    _of(DECODER),
    ("vision encoder", lambda file: PRECISIONS[file.precision].vision),
    _of(VISION),
    ("good for", lambda file: PRECISIONS[file.precision].use),
)


def vision_values(files: Sequence[Published], chosen: Published) -> dict[str, Any]:
    """Return the values that the template of LFM2-VL asks for, besides those of every card.

    Args:
        files: the precisions of the published folder.
        chosen: the one that the examples load.
    """
    own = PRECISIONS[chosen.precision]
    coarse = [PRECISIONS[file.precision] for file in files if PRECISIONS[file.precision].variant in ("q4", "q4s")]
    # The embedding of q4s has 4 bits too.
    kept = [
        precision.named(part)
        for precision in coarse
        for part in ((VISION, EMBEDDING) if precision.variant == "q4" else (VISION,))
    ]
    named = next((file.precision for file in (chosen, *files) if PRECISIONS[file.precision].is_dtype), "")
    best = next((file.precision for file in files if file.precision in ("fp16", "q8")), named)
    dtypes = {VISION: best, EMBEDDING: named, DECODER: named}
    return {
        "table": file_table(files, COLUMNS),
        "vision": own.named(VISION),
        "embedding": own.named(EMBEDDING),
        "in_8_bits": ", ".join(f"`{name}`" for name in kept),
        "parts": ", ".join(f'{part}: "{dtype}"' for part, dtype in dtypes.items()),
    }
