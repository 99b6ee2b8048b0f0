"""Load the model for an export. It has no weights in memory: a `checkpoint` reads them when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optimum.exporters.tasks import TasksManager
from optimum.utils import logging
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import MEMBERS, MODEL_TYPES, member_of
from optimum_lfm2.graph.member import Member
from optimum_lfm2.loading.companions import check_tokenizer, generation_settings
from optimum_lfm2.loading.config_check import loaded_config
from optimum_lfm2.loading.modules import find_modules
from optimum_lfm2.loading.notices import tell_of_adapter, tell_of_modules, tell_of_unread, warn_once
from optimum_lfm2.loading.processor import find_processor
from optimum_lfm2.loading.supported import check_architecture
from optimum_lfm2.weights.checkpoint import find_tensors, stored_tensors
from optimum_lfm2.weights.experts import is_part


logger = logging.get_logger(__name__)


def is_ours(model_name_or_path: str | Path, **kwargs: Any) -> bool:
    """Return whether the `config.json` of a model names a type of ours. Return False if it cannot be read.

    Args:
        model_name_or_path: a folder, or an id on the Hub.
        kwargs: arguments of `from_pretrained`. Those that say where the file is are used.
    """
    where = {name: value for name, value in _hub(kwargs).items() if name != "force_download"}
    try:
        config, _ = PretrainedConfig.get_config_dict(model_name_or_path, **where)
    except Exception:  # whatever loads the model says what is wrong with it
        return False
    return config.get("model_type") in MODEL_TYPES


class Lfm2TasksManager(TasksManager):
    """The `TasksManager` that `optimum.exporters.onnx.main_export` uses. Nothing else uses it.

    For our models it infers the task of a local folder, and loads a model on the meta device. Optimum would load all
    weights; here `bind` streams them from the checkpoint. Every other call goes to Optimum with unchanged arguments.
    """

    @classmethod
    def infer_task_from_model(cls, model: Any, *args: Any, **kwargs: Any) -> str:
        """Return the task of the checkpoint's class, such as `text-generation` for one with a language model's head.

        Raises:
            Lfm2Error: a checkpoint of ours cannot be exported.
        """
        if not _is_for_us(model, *args, **kwargs):
            return TasksManager.infer_task_from_model(model, *args, **kwargs)
        return task_of(_lfm2_config(model, **kwargs))

    @staticmethod
    def get_supported_tasks_for_model_type(model_type: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the tasks of all members of a model type. `get_model_from_task` refuses those of another member."""
        supported = TasksManager.get_supported_tasks_for_model_type
        tasks = dict(supported(model_type, *args, **kwargs))
        for member in MEMBERS:
            if member.model_type == model_type and member.export_type:
                tasks = supported(member.export_type, *args, **kwargs) | tasks
        return tasks

    @classmethod
    def infer_library_from_model(cls, model: Any, *args: Any, **kwargs: Any) -> str:
        # The first question of `main_export`: a wrong configuration is refused before transformers trips over it.
        if _is_for_us(model, *args, **kwargs):
            _checked_config(model, **kwargs)
            return (
                "transformers"  # also beside files of sentence-transformers, for which Optimum would take another way
            )
        return TasksManager.infer_library_from_model(model, *args, **kwargs)

    @staticmethod
    def get_model_from_task(task: str, model_name_or_path: Any, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Return the model on the meta device. Its attribute `checkpoint` maps names to stored weights.

        Raises:
            Lfm2Error: a checkpoint of ours cannot be exported, or not in this dtype.
        """
        if not _is_for_us(model_name_or_path, *args, **kwargs):
            return TasksManager.get_model_from_task(task, model_name_or_path, *args, **kwargs)
        config = _lfm2_config(model_name_or_path, tell=warn_once, **kwargs)
        hub, dtype = _hub(kwargs), kwargs.get("torch_dtype")
        member = member_of(config)
        check_task(task, config)
        check_dtype(dtype)
        files = find_tensors(model_name_or_path, **hub)
        check_tokenizer(model_name_or_path, **hub)
        model: Any = weightless(config, task.removesuffix("-with-past"), dtype or torch.float32)
        if not config.architectures and member.text is None:
            _check_assumed(config, files)
        if model.can_generate():
            model.generation_config = _generation_config(model_name_or_path, config, hub)
        if member.encodes:
            _export_as(model, member)
        if not model.can_generate():
            model.source = Source(
                str(model_name_or_path),
                hub,
                find_modules(model_name_or_path, **hub),
                trusted=member.encodes and bool(kwargs.get("trust_remote_code")),
            )
        elif member.text is None:
            tell_of_modules(model_name_or_path, task, **hub)
        model.checkpoint = member.checkpoint(files, model)
        if member.text is not None:
            model.processor = find_processor(model_name_or_path, config, member.tower.processor, **hub)
        tell_of_adapter(model_name_or_path, **hub)
        own = weightless(config, task_of(config), model.dtype)
        tell_of_unread(model_name_or_path, model.checkpoint, stored_tensors(own).keys() - stored_tensors(model).keys())
        return model


def _is_for_us(model: Any, *args: Any, library_name: str | None = None, **kwargs: Any) -> bool:
    """Return whether a call of the `TasksManager` is about a model of ours.

    Optimum passes keyword arguments. A call with positional ones comes from elsewhere, and goes to Optimum.
    """
    by_name = not args and library_name in (None, "transformers") and isinstance(model, (str, Path))
    return by_name and is_ours(model, **kwargs)


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


def task_of(config: PretrainedConfig) -> str:
    """Return the task of a checkpoint, without past. One saved without a head has `feature-extraction`."""
    return member_of(config).task(config.architectures)


def check_task(task: str, config: PretrainedConfig | Mapping[str, Any]) -> None:
    """Refuse a task that a checkpoint has no head for.

    Args:
        task: a task of Optimum, such as `text-generation-with-past`.
        config: the checkpoint's configuration, or its `config.json`.

    Raises:
        Lfm2Error: the message lists the tasks that there are.
    """
    member = member_of(config)
    names = config.get("architectures") if isinstance(config, Mapping) else config.architectures
    # A decoder's head is tied to its embedding, or its tensors are missed.
    known = list(dict.fromkeys((member.task(names), "feature-extraction"))) if member.encodes else member.tasks
    if task not in known:
        what = names[0] if member.encodes else "LFM2"
        raise Lfm2Error(f"--task {task}: {what} is exported for {', '.join(known)}.")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is.

    Attributes:
        name: its folder, or its id on the Hub.
        hub: arguments of `transformers.utils.cached_file`, such as `revision`.
        modules: the files of sentence-transformers beside it (`find_modules`).
        trusted: whether an encoder brings code that the user trusts.
    """

    name: str
    hub: Mapping[str, Any]
    modules: Mapping[str, Path]
    trusted: bool


def _export_as(model: PreTrainedModel, member: Member) -> None:
    """Let Optimum find the exporter by `export_type`.

    Optimum reads the type from the class of the configuration: what an instance holds would be saved.
    """
    config: Any = model.config
    config.__class__ = type(type(config).__name__, (type(config),), {"export_model_type": member.export_type})


def materialize_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers on the meta device that no checkpoint stores: those of rotary modules.

    A new module replaces each rotary module. All other modules stay.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if any(child.get_buffer(own).is_meta for own in child._non_persistent_buffers_set):
                setattr(module, name, type(child)(model.config))


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise `Lfm2Error` for bfloat16, for which the graph's operators have no kernels (onnxruntime 1.32, CPU)."""
    if dtype == torch.bfloat16:
        raise Lfm2Error(
            "bf16: onnxruntime has no bfloat16 kernels for these operators on the CPU. "
            "Use fp32, or fp16 for a file of the same size."
        )


def _check_assumed(config: PretrainedConfig, files: Mapping[str, Path]) -> None:
    """Refuse a checkpoint without `architectures` that stores tensors which a language model does not have."""
    expected = weightless(config, task_of(config), torch.float32)
    own = stored_tensors(expected).keys()
    # A checkpoint may store each expert's matrices. transformers merges them to tensors with other names.
    strange = sorted(name for name in files if name not in own and not is_part(name))
    if strange:
        raise Lfm2Error(
            f"config.json names no architectures, and {strange[0]} is no tensor of {type(expected).__name__}. Write "
            f'what the model is into config.json, such as "architectures": ["{type(expected).__name__}"].'
        )


def _generation_config(model_name_or_path: str, config: PretrainedConfig, hub: dict[str, Any]) -> GenerationConfig:
    written = generation_settings(model_name_or_path, **hub)
    return GenerationConfig.from_model_config(config) if written is None else written


def _checked_config(
    model_name_or_path: str | Path, tell: Callable[[str], None] = logger.info, **kwargs: Any
) -> PretrainedConfig:
    hub = _hub(kwargs)
    # This checks the file's own fields. transformers replaces some wrong ones by defaults, and fails on others.
    check_architecture(PretrainedConfig.get_config_dict(model_name_or_path, **hub)[0])
    return loaded_config(model_name_or_path, tell, **hub)


def _lfm2_config(model_name_or_path: str | Path, **kwargs: Any) -> PretrainedConfig:
    config = _checked_config(model_name_or_path, **kwargs)
    compat.spell_rope_for_both(config.get_text_config())
    return config


def _hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}
