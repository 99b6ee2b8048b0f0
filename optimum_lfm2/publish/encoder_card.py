"""The model card of a published encoder: what `card.py` adds to its own values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optimum_lfm2.errors import read_object
from optimum_lfm2.loading.modules import MODULES
from optimum_lfm2.report import LOADERS


POOLING = ".Pooling"


def encoder_values(folder: Path, task: str) -> dict[str, Any]:
    """Return the values that the template of an encoder asks for, besides those of every card.

    Args:
        folder: the published folder, with the files of sentence-transformers where the checkpoint has them.
        task: the task of the encoder's head.
    """
    ort_class, output = LOADERS[task]
    settings = folder / "config_sentence_transformers.json"
    prompts = read_object(settings).get("prompts") if settings.is_file() else None
    prompt = next((name for name in ("document", "passage") if name in (prompts or {})), None)
    return {
        "ort_class": ort_class,
        "output": output,
        "pooled": any(str(module.get("type")).endswith(POOLING) for module in _modules(folder)),
        "prompt": f', prompt_name="{prompt}"' if prompt else "",
    }


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / MODULES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
