"""The model of a checkpoint, without weights in memory. Its `checkpoint` reads them when they are needed."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import member_of
from optimum_lfm2.loading.companions import check_tokenizer
from optimum_lfm2.loading.notices import tell_of_adapter, tell_of_modules, tell_of_unread, warn_once
from optimum_lfm2.loading.source import Source, check_dtype
from optimum_lfm2.weights.checkpoint import stored_tensors
from optimum_lfm2.weights.experts import is_part


def load_model(source: Source, task: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return the model of a checkpoint on the meta device, in evaluation mode.

    Args:
        source: the checkpoint.
        task: a task of Optimum, such as `text-generation-with-past`.
        dtype: of its parameters. None means float32.

    Returns:
        A model with the attributes `checkpoint`, which maps names to stored weights, and `source`.

    Raises:
        Lfm2Error: the checkpoint has no head for the task, cannot be exported in this dtype, or a file is broken.
    """
    member, config = source.member, source.config
    member.check_task(task, config.architectures)
    check_dtype(dtype)
    _ = source.files  # these are refused before the tokenizer
    check_tokenizer(source.name, **source.hub)
    if not config.architectures and not member.in_parts:
        _check_assumed(source)
    part = task.removesuffix("-with-past")
    model = _with_checkpoint(source, part, dtype or torch.float32)
    if model.can_generate():
        model.generation_config = source.generation_config
    if member.export_type:
        _export_as(model, member.export_type)
    if model.can_generate() and not member.in_parts:
        tell_of_modules(source.name, task, **source.hub)
    model.source = source
    _ = source.processor  # a processor that does not fit is refused before the work
    tell_of_adapter(source.name, **source.hub)
    whole = model if part == source.task else weightless(config, source.task, model.dtype)
    tell_of_unread(source.name, model.checkpoint, stored_tensors(whole).keys() - stored_tensors(model).keys())
    return model


def _with_checkpoint(source: Source, task: str, dtype: torch.dtype) -> Any:
    """Return the model on the meta device with its `checkpoint`.

    Where the configuration ties the head to the embedding and the checkpoint stores both, with different values, the
    head is untied if transformers does so. Then the configuration says so too.
    """
    model: Any = weightless(source.config, task, dtype)
    model.checkpoint = source.member.checkpoint(source.files, model)
    head = model.checkpoint.second_head
    if head is None or not compat.KEEPS_BOTH_HEADS:
        return model
    warn_once(
        f"{source.name}: config.json ties {head} to the embedding, and it is stored with other values. It is used, as "
        f"transformers {transformers.__version__} uses it."
    )
    for part in (source.config, source.config.get_text_config()):
        part.tie_word_embeddings = False
    return _with_checkpoint(source, task, dtype)


def weightless(config: PretrainedConfig, task: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of `config` on the meta device. It has names, shapes and the dtype, and takes no memory.

    Args:
        config: the model's configuration.
        task: a key of the member's `models`.
        dtype: the dtype of its parameters.
    """
    for part in getattr(config, "sub_configs", ()):  # transformers 4.57 makes each part in the dtype that it names
        getattr(config, part).dtype = dtype
    with torch.device("meta"):
        return member_of(config).models[task](config, dtype=dtype).eval()


def materialize_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers on the meta device that no checkpoint stores: those of rotary modules.

    A new module replaces each rotary module. All other modules stay.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if any(child.get_buffer(own).is_meta for own in child._non_persistent_buffers_set):
                setattr(module, name, type(child)(getattr(child, "config", model.config)))


def _export_as(model: PreTrainedModel, name: str) -> None:
    """Let Optimum find the exporter by another name than the model type.

    Optimum reads the type from the class of the configuration: what an instance holds would be saved.
    """
    config: Any = model.config
    config.__class__ = type(type(config).__name__, (type(config),), {"export_model_type": name})


def _check_assumed(source: Source) -> None:
    """Refuse a checkpoint without `architectures` that stores tensors which a language model does not have."""
    expected = weightless(source.config, source.task, torch.float32)
    own = stored_tensors(expected).keys()
    # A checkpoint may store each expert's matrices. transformers merges them to tensors with other names.
    strange = sorted(name for name in source.files if name not in own and not is_part(name))
    if strange:
        raise Lfm2Error(
            f"config.json names no architectures, and {strange[0]} is no tensor of {type(expected).__name__}. Write "
            f'what the model is into config.json, such as "architectures": ["{type(expected).__name__}"].'
        )
