"""Tell of what a checkpoint holds and an export does not use. Each is one line, a warning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from optimum.utils import logging

from optimum_lfm2.loading.adapters import ADAPTER_CONFIG
from optimum_lfm2.loading.companions import find_file
from optimum_lfm2.loading.modules import MODULES
from optimum_lfm2.weights.checkpoint import FOREIGN_NAMES, Checkpoint


# A checkpoint is opened several times in an export.
warn_once = cache(logging.get_logger(__name__).warning)


def tell_of_adapter(model_name_or_path: str, **hub: Any) -> None:
    """Tell of a PEFT adapter beside a whole model. transformers applies it where peft is installed."""
    if find_file(model_name_or_path, ADAPTER_CONFIG, hub) is not None:
        warn_once(
            f"{model_name_or_path} has a PEFT adapter ({ADAPTER_CONFIG}) beside the model, and it is ignored. To "
            "export the model with it, load both with peft, save what merge_and_unload() returns, and export that."
        )


def tell_of_modules(model_name_or_path: str, task: str, **hub: Any) -> None:
    """Tell of files of sentence-transformers or PyLate beside a model that is exported to predict tokens."""
    if find_file(model_name_or_path, MODULES, hub) is not None:
        warn_once(
            f"{model_name_or_path} has files of sentence-transformers ({MODULES}), which are not copied for --task "
            f"{task}. Use --task feature-extraction for a folder that sentence-transformers opens."
        )


def tell_of_unread(model_name_or_path: str, checkpoint: Checkpoint, known: Iterable[str]) -> None:
    """Tell of stored tensors that no parameter is read from.

    Args:
        model_name_or_path: the checkpoint's folder, or its id on the Hub.
        checkpoint: its tensors.
        known: names of tensors that the user knows to be left out, since the task of the export does not need them.
    """
    unread = [name for name in checkpoint.unread if name not in set(known)]
    if not unread:
        return
    others = f" and {len(unread) - 1} more stored tensors are" if len(unread) > 1 else " is"
    warn_once(f"{model_name_or_path}: {unread[0]}{others} not used. {_reason(unread[0], checkpoint)}")


def _reason(name: str, checkpoint: Mapping[str, Any]) -> str:
    if name in checkpoint:
        return "It differs from the embedding, which config.json ties it to."
    for marker, (program, remedy) in FOREIGN_NAMES.items():
        if marker in f".{name}":
            return f"Such names are of {program}. {remedy}"
    return "The model that config.json describes has no such parameter. Is this its own config.json?"
