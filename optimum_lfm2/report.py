"""What a command says at its end: the files that it wrote, what their check found, and what to do next."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from transformers.utils import CONFIG_NAME

from optimum_lfm2.compat import TRANSFORMERS_5


# The class that loads a file, and the file's first output, by the task of the export. None stands for the class that
# the member's record names.
LOADERS = {
    "text-generation": (None, "logits"),
    "image-text-to-text": (None, "logits"),
    "feature-extraction": ("ORTModelForFeatureExtraction", "last_hidden_state"),
    "fill-mask": ("ORTModelForMaskedLM", "logits"),
    "token-classification": ("ORTModelForTokenClassification", "logits"),
    "text-classification": ("ORTModelForSequenceClassification", "logits"),
}
WITH_PAST = "-with-past"
DISTRIBUTION = "optimum-lfm2"
REPOSITORY = "Repository"  # the label of its URL in pyproject.toml


def megabytes(size: int) -> str:
    """Return a number of bytes in MB, with three digits or more."""
    return f"{size / 1e6:.{0 if size >= 1e8 else 1 if size >= 1e7 else 2}f}"


def size_with_weights(path: Path) -> int:
    """Return the bytes of an ONNX file and of its weights, which may lie in a file beside it."""
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}_data")) if file.is_file())


def text_table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of equal length as lines of text for a terminal, each column as wide as its widest cell."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def loading(task: str, folder: str | Path, own: str = "ORTLfm2ForCausalLM", **names: str) -> str | None:
    """Return the lines of Python that load an export, indented by two spaces.

    Args:
        task: the task of the export. With past it has a class of its own for text alone: None is returned for others.
        folder: the exported folder.
        own: the class of this package for the member (`Member.loader`).
        names: `subfolder` and `file_name`, where the folder has several files.
    """
    plain = task.removesuffix(WITH_PAST)
    if plain not in LOADERS or (task != plain and plain != "text-generation"):
        return None
    name = LOADERS[plain][0] or own
    package = "optimum_lfm2" if name == own else "optimum.onnxruntime"
    # On transformers 5, optimum-onnx 0.1.0 cannot be imported before us.
    first = "  import optimum_lfm2\n" if package != "optimum_lfm2" and TRANSFORMERS_5 else ""
    given = ", ".join([_quoted(str(folder)), *(f"{key}={_quoted(value)}" for key, value in names.items())])
    return f"{first}  from {package} import {name}\n  model = {name}.from_pretrained({given})"


def _quoted(text: str) -> str:
    """Return a text as Python writes it between double quotes, with letters of any alphabet as they are."""
    return json.dumps(text, ensure_ascii=False)


def loading_file(task: str, path: Path) -> str | None:
    """Return the lines of Python that load one ONNX file of an export, as `loading` does.

    The folder is the one that holds the model's configuration: that of the file, or the one above.
    """
    folder = path.parent
    above = folder.absolute().parent
    if (folder / CONFIG_NAME).is_file() or not (above / CONFIG_NAME).is_file():
        return loading(task, folder, file_name=path.name)
    given = folder.parent if folder.parts and folder.parts[-1] != ".." else above
    return loading(task, given, subfolder=folder.absolute().name, file_name=path.name)


def repository() -> str | None:
    """Return the URL of this package's repository, as its metadata has it. None where it has none."""
    try:
        urls = metadata(DISTRIBUTION).get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    found = (url.split(", ", 1) for url in urls)
    return next((url for label, url in found if label == REPOSITORY), None)
