"""The `TasksManager` of Optimum's export. For our models it reads the checkpoint as this room does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum.exporters.tasks import TasksManager
from transformers import AutoConfig, PreTrainedModel

from optimum_lfm2.families import MEMBERS
from optimum_lfm2.loading.models import load_model
from optimum_lfm2.loading.notices import warn_once
from optimum_lfm2.loading.source import Source, is_ours


class Lfm2AutoConfig(AutoConfig):
    """The `AutoConfig` of `optimum.exporters.onnx.main_export`, which asks the configuration how it is quantised.

    Optimum fails where a checkpoint answers by null (optimum-onnx 0.1.0), and so does transformers 4.57.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and is_ours(pretrained_model_name_or_path, **kwargs):
            return Source.open(pretrained_model_name_or_path, **kwargs).config
        return AutoConfig.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


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
        return Source.open(model, **kwargs).task

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
            Source.open(model, **kwargs)
            return (
                "transformers"  # also beside files of sentence-transformers, for which Optimum would take another way
            )
        return TasksManager.infer_library_from_model(model, *args, **kwargs)

    @staticmethod
    def get_model_from_task(task: str, model_name_or_path: Any, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Return the model as `load_model` does, with its errors."""
        if not _is_for_us(model_name_or_path, *args, **kwargs):
            return TasksManager.get_model_from_task(task, model_name_or_path, *args, **kwargs)
        source = Source.open(model_name_or_path, tell=warn_once, **kwargs)
        return load_model(source, task, kwargs.get("torch_dtype"))


def _is_for_us(model: Any, *args: Any, library_name: str | None = None, **kwargs: Any) -> bool:
    """Return whether a call of the `TasksManager` is about a model of ours.

    Optimum passes keyword arguments. A call with positional ones comes from elsewhere, and goes to Optimum.
    """
    by_name = not args and library_name in (None, "transformers") and isinstance(model, (str, Path))
    return by_name and is_ours(model, **kwargs)
