"""A GGUF file at the door. For the time of an export, a folder stands for it that has what a checkpoint's has.

The folder holds a config.json and a tokenizer, made of the file's metadata, and a link to the file. So whatever reads a
checkpoint reads it too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import CONFIG_NAME

from optimum_lfm2.errors import Lfm2Error, first_line
from optimum_lfm2.families import MEMBERS
from optimum_lfm2.loading.companions import find_file
from optimum_lfm2.loading.gguf_modules import write_modules
from optimum_lfm2.loading.gguf_tokenizer import tokenizer_of
from optimum_lfm2.loading.supported import check_architecture
from optimum_lfm2.weights.checkpoint import GGUF_LINK
from optimum_lfm2.weights.gguf import SUFFIX, GgufFields, GgufFile


# What `general.license` and the like are called in a model card.
LICENSE = {"license": "license", "license_name": "license.name", "license_link": "license.link"}


def is_gguf(model: str | Path, gguf_file: str | None = None) -> bool:
    """Return whether a GGUF file is meant: a path to one, or the name of one in a folder or in a model of the Hub."""
    return gguf_file is not None or (Path(model).suffix == SUFFIX and Path(model).is_file())


@contextmanager
def standing_in(
    model: str | Path, gguf_file: str | None = None, tokenizer: str | None = None, **hub: Any
) -> Iterator[Path]:
    """Yield a folder that stands for a GGUF file as long as the `with` block runs.

    Args:
        model: the file, or the folder or the model of the Hub that has it.
        gguf_file: its name there.
        tokenizer: a folder or a model of the Hub whose tokenizer to take. None makes it of the metadata.
        hub: arguments of `transformers.utils.cached_file`, such as `revision`.

    Raises:
        Lfm2Error: the file cannot be read, or holds a model that is not exported.
    """
    file = GgufFile.open(_path(model, gguf_file, hub))
    config = config_of(file)
    with TemporaryDirectory(prefix="lfm2-gguf-") as place:
        folder = Path(place, file.path.stem)
        folder.mkdir()
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
        (folder / GGUF_LINK).symlink_to(file.path.absolute())
        _write_tokenizer(file, tokenizer, folder, config["vocab_size"])
        _write_license(file, folder)
        write_modules(file, folder)
        yield folder


def config_of(file: GgufFile) -> dict[str, Any]:
    """Return the config.json of the model in a file.

    Raises:
        Lfm2Error: the model is not one of ours, or is not exported.
    """
    known = {name: make for member in MEMBERS for name, make in member.gguf.items()}
    if file.architecture not in known:
        raise Lfm2Error(
            f"{file.path} holds a model of the architecture {file.architecture}. These are exported: "
            f"{', '.join(known)}."
        )
    if "rope_freqs.weight" in file.tensors:
        raise Lfm2Error(f"{file.path} has rotary frequencies of its own (rope_freqs). Export the original checkpoint.")
    fields = GgufFields(file)
    config = known[file.architecture](fields)
    fields.check_all_taken()
    check_architecture(config, str(file.path))
    return config


def _path(model: str | Path, gguf_file: str | None, hub: dict[str, Any]) -> Path:
    if gguf_file is None:
        return Path(model)
    try:
        path = find_file(str(model), gguf_file, hub)
    except OSError as error:  # there is no such model, or no network
        raise Lfm2Error(f"{gguf_file} of {model} cannot be had: {first_line(error)}") from None
    if path is None or path.suffix != SUFFIX:
        raise Lfm2Error(f"{model} has no file {gguf_file} that ends in {SUFFIX}. Is it spelled right?")
    return path


def _write_tokenizer(file: GgufFile, other: str | None, folder: Path, rows: int) -> None:
    try:
        tokenizer = tokenizer_of(file) if other is None else AutoTokenizer.from_pretrained(other)
    except (OSError, ValueError) as error:
        if isinstance(error, Lfm2Error):
            raise
        raise Lfm2Error(f"--tokenizer {other} cannot be loaded: {first_line(error)}") from None
    if tokenizer is None:
        return
    if len(tokenizer) > rows:
        raise Lfm2Error(
            f"The tokenizer of {other or file.path} has {len(tokenizer)} tokens, and {file.path} has {rows} rows of "
            "embeddings. One of the two belongs to another model."
        )
    tokenizer.save_pretrained(folder)


def _write_license(file: GgufFile, folder: Path) -> None:
    """Write a card with the licence, where `export lfm2` looks for it."""
    found = {name: file.metadata.get(f"general.{key}") for name, key in LICENSE.items()}
    lines = [f"{name}: {json.dumps(value)}" for name, value in found.items() if isinstance(value, str)]
    if lines:
        (folder / "README.md").write_text("\n".join(["---", *lines, "---", ""]), encoding="utf-8")
