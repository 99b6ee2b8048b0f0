"""Declare for Transformers.js which ONNX files have their weights in a file of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from optimum_lfm2.errors import read_object
from optimum_lfm2.loading.config_check import JS_CONFIG


__all__ = ["JS_CONFIG", "declare_external_data"]

EXTERNAL_DATA = "use_external_data_format"


def declare_external_data(folder: Path, files: Iterable[Path], settings: Mapping[str, Any]) -> None:
    """Declare in `config.json` which ONNX files have their weights in a file of their own.

    Args:
        folder: the folder of `config.json`.
        files: the ONNX files. They may still be in another folder.
        settings: other settings for Transformers.js.
    """
    path = folder / "config.json"
    config = read_object(path)
    declared = {file.name: True for file in files if file.with_name(f"{file.name}_data").is_file()}
    config[JS_CONFIG] = {**settings, EXTERNAL_DATA: declared}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
