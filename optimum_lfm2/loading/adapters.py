"""Refuse a PEFT adapter, which is no checkpoint, before anything looks for its config.json."""

from __future__ import annotations

from pathlib import Path

from optimum_lfm2.errors import Lfm2Error, read_object
from optimum_lfm2.families import MODEL_TYPES


ADAPTER_CONFIG = "adapter_config.json"


def check_adapter(folder: Path) -> None:
    """Raise `Lfm2Error` for a folder that holds a PEFT adapter of our model and no model. Ignore all other folders."""
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        return
    try:
        base = str(read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))
        model_type = read_object(Path(base, "config.json")).get("model_type") if Path(base).is_dir() else None
    except (OSError, Lfm2Error):
        return  # the adapter may be of anybody's model
    if model_type in MODEL_TYPES or "lfm2" in base.lower():
        raise Lfm2Error(
            f"{folder} is a PEFT adapter of {base}, not a model. Load it with peft, save what its merge_and_unload() "
            "returns, and the tokenizer, to a folder, and give that folder."
        )
