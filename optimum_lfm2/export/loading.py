"""The model that Optimum exports: its structure at once, its weights when they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from optimum.exporters.tasks import TasksManager
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export.config_check import loaded_config
from optimum_lfm2.export.supported import check_architecture
from optimum_lfm2.families import MEMBERS, MODEL_TYPES
from optimum_lfm2.weights.checkpoint import find_tensors, stored_tensors, tied_names
from optimum_lfm2.weights.companions import check_tokenizer, generation_settings
from optimum_lfm2.weights.experts import is_part, whole


AUTO_CLASSES = {"text-generation": AutoModelForCausalLM, "feature-extraction": AutoModel}


def is_ours(model_name_or_path: str | Path, **kwargs: Any) -> bool:
    """Whether the `config.json` of a folder or an id of the Hub names a model type of ours. False where it has none.

    Args:
        kwargs: arguments of `from_pretrained`; those that say where the file is are heeded.
    """
    where = {name: value for name, value in _hub(kwargs).items() if name != "force_download"}
    try:
        config, _ = PretrainedConfig.get_config_dict(model_name_or_path, **where)
    except Exception:  # whoever loads the model says what is wrong with it
        return False
    return config.get("model_type") in MODEL_TYPES


class Lfm2TasksManager(TasksManager):
    """The `TasksManager` of `optimum.exporters.onnx.main_export`, and of nothing else.

    For LFM2 it infers the task of a local folder, and returns a model on the meta device whose weights `bind` streams
    from the checkpoint: Optimum would load them all. For every other model it is Optimum's, with the same arguments.
    """

    @classmethod
    def infer_task_from_model(cls, model: Any, *args: Any, **kwargs: Any) -> str:
        if not _is_for_us(model, *args, **kwargs):
            return TasksManager.infer_task_from_model(model, *args, **kwargs)
        return "text-generation" if is_causal(_lfm2_config(model, **kwargs)) else "feature-extraction"

    @classmethod
    def infer_library_from_model(cls, model: Any, *args: Any, **kwargs: Any) -> str:
        # The first question of `main_export`: a wrong configuration is refused before transformers trips over it.
        if _is_for_us(model, *args, **kwargs):
            _checked_config(model, **kwargs)
        return TasksManager.infer_library_from_model(model, *args, **kwargs)

    @staticmethod
    def get_model_from_task(task: str, model_name_or_path: Any, *args: Any, **kwargs: Any) -> PreTrainedModel:
        if not _is_for_us(model_name_or_path, *args, **kwargs):
            return TasksManager.get_model_from_task(task, model_name_or_path, *args, **kwargs)
        config, hub, dtype = _lfm2_config(model_name_or_path, **kwargs), _hub(kwargs), kwargs.get("torch_dtype")
        check_dtype(dtype)
        files = find_tensors(model_name_or_path, **hub)
        check_tokenizer(model_name_or_path, **hub)
        model: Any = weightless(config, task.removesuffix("-with-past"), dtype or torch.float32)
        if not config.architectures:
            _check_assumed(config, files)
        if model.can_generate():
            model.generation_config = _generation_config(model_name_or_path, config, hub)
        model.checkpoint = MEMBERS[config.model_type].checkpoint(files, model)
        model.to = _Materialize(model)
        return model


def _is_for_us(model: Any, *args: Any, library_name: str | None = None, **kwargs: Any) -> bool:
    """Whether a call of the `TasksManager` is about a model of ours. Optimum names its arguments; others may not."""
    by_name = not args and library_name in (None, "transformers") and isinstance(model, (str, Path))
    return by_name and is_ours(model, **kwargs)


class _Materialize:
    """`model.to` of a weightless model: reads the weights first. Optimum calls it before it runs the model."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        model = self._model
        del model.to
        model.load_state_dict(
            {name: whole(model.checkpoint[name]) for name in _own_names(model)}, assign=True, strict=False
        )
        model.tie_weights()
        materialize_buffers(model)
        return model.to(*args, **kwargs)


def weightless(config: PretrainedConfig, task: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` on the meta device: names, shapes and dtype, and no memory."""
    with torch.device("meta"):
        return AUTO_CLASSES[task].from_config(config, dtype=dtype).eval()


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a checkpoint has a language model's head: all but those saved from the bare decoder."""
    return any(name.endswith("ForCausalLM") for name in config.architectures or ["Lfm2ForCausalLM"])


def _own_names(model: PreTrainedModel) -> list[str]:
    return [name for name, first in tied_names(model).items() if name == first]


def materialize_buffers(model: PreTrainedModel) -> None:
    """Some buffers are not in the checkpoint: the rotary modules compute theirs. Other modules stay as they are."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if any(child.get_buffer(own).is_meta for own in child._non_persistent_buffers_set):
                setattr(module, name, type(child)(model.config))


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise `Lfm2Error` for a type that the graph's operators have no kernels for."""
    if dtype == torch.bfloat16:
        raise Lfm2Error(
            "bf16: onnxruntime has no bfloat16 kernels for these operators on the CPU. "
            "Use fp32, or fp16 for a file of the same size."
        )


def _check_assumed(config: PretrainedConfig, files: Mapping[str, Path]) -> None:
    """A checkpoint that does not say what it is passes for a language model where it holds no other tensors."""
    expected = weightless(config, "text-generation", torch.float32)
    own = stored_tensors(expected).keys()
    # Experts may lie in parts, of which transformers makes its own tensors.
    strange = sorted(name for name in files if name not in own and not is_part(name))
    if strange:
        raise Lfm2Error(
            f"config.json names no architectures, and {strange[0]} is no tensor of {type(expected).__name__}. Write "
            f'what the model is into config.json, such as "architectures": ["{type(expected).__name__}"].'
        )


def _generation_config(model_name_or_path: str, config: PretrainedConfig, hub: dict[str, Any]) -> GenerationConfig:
    written = generation_settings(model_name_or_path, **hub)
    return GenerationConfig.from_model_config(config) if written is None else written


def _checked_config(model_name_or_path: str | Path, **kwargs: Any) -> PretrainedConfig:
    hub = _hub(kwargs)
    # As it is written: what transformers makes of it has defaults in place of what is wrong, or is an error of its own.
    check_architecture(PretrainedConfig.get_config_dict(model_name_or_path, **hub)[0])
    return loaded_config(model_name_or_path, **hub)


def _lfm2_config(model_name_or_path: str | Path, **kwargs: Any) -> PretrainedConfig:
    config = _checked_config(model_name_or_path, **kwargs)
    compat.spell_rope_for_both(config)
    return config


def _hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}
