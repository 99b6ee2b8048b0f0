"""The files of sentence-transformers and PyLate: what follows hidden states (pooling, dense layers), and prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from optimum_lfm2.errors import Lfm2Error, read_object
from optimum_lfm2.loading.companions import find_file


MODULES = "modules.json"
SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")
OF_A_MODULE = ("config.json", "model.safetensors", "pytorch_model.bin")
PACKAGES = ("sentence_transformers", "pylate")


def find_modules(model_name_or_path: str, **hub: Any) -> dict[str, Path]:
    """Find the files of sentence-transformers beside a checkpoint.

    Args:
        model_name_or_path: the checkpoint's folder, or its id on the Hub.
        hub: arguments of `transformers.utils.cached_file`, such as `revision`.

    Returns:
        Each file by its name relative to the checkpoint. It is empty where there is no `modules.json`.

    Raises:
        Lfm2Error: a module is of another package, or its folder is outside the checkpoint.
    """
    listed = find_file(model_name_or_path, MODULES, hub)
    if listed is None:
        return {}
    files = {MODULES: listed}
    for name in SETTINGS:
        if (path := find_file(model_name_or_path, name, hub)) is not None:
            read_object(path)
            files[name] = path
    for module in _modules(listed):
        kind, folder = str(module.get("type")), str(module.get("path", ""))
        if kind.split(".")[0] not in PACKAGES:
            raise Lfm2Error(
                f"{listed} names the module {kind}, which is code of the checkpoint's own. What the exported model's "
                f"outputs become is not known here. Export a copy without {MODULES}."
            )
        if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts or "\\" in folder:
            raise Lfm2Error(f"{listed} names the folder {folder}, which is outside the checkpoint. Copy it again.")
        if folder:
            found = {name: find_file(model_name_or_path, f"{folder}/{name}", hub) for name in OF_A_MODULE}
            files |= {f"{folder}/{name}": path for name, path in found.items() if path is not None}
    return files


def _modules(path: Path) -> list[Mapping[str, Any]]:
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Lfm2Error(f"{path} cannot be read as JSON ({error}). Download or copy it again.") from None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise Lfm2Error(f"{path} holds no list of modules. Download or copy it again.")
    return modules


def copy_modules(files: Mapping[str, Path], folder: Path) -> None:
    """Copy what `find_modules` found into an exported folder, under the same names."""
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
