"""The exported folders that a server serves, as transformers' server asks for them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseGenerateManager, GenerationState, Modality

from optimum_lfm2.runtime.scheduler import Limits
from optimum_lfm2.serving.folder import Loaded
from optimum_lfm2.serving.manager import SharedManager
from optimum_lfm2.sidecars.response_template import template_for


class Models(ModelManager):
    """Models by name. All are loaded before the server starts, and stay.

    Args:
        loaded: the models by their names.
    """

    def __init__(self, loaded: Mapping[str, Loaded]) -> None:
        super().__init__(device="cpu", model_timeout=-1)
        self._loaded = dict(loaded)
        self._created = int(time.time())
        for one in loaded.values():  # a folder of export onnx has no template of answers
            if getattr(one.tokenizer, "response_template", None) is None:
                one.tokenizer.response_template = template_for(one.tokenizer.get_vocab(), one.tokenizer.chat_template)
            if one.processor is not None:
                one.processor.tokenizer = one.tokenizer

    def resolve(self, name: str | None) -> tuple[str, Any, Any]:
        """Return the name, the model, and its processor or tokenizer. The only model needs no name.

        Raises:
            HTTPException: there is no such model.
        """
        if name is None and len(self._loaded) == 1:
            name = next(iter(self._loaded))
        if not isinstance(name, str) or name not in self._loaded:
            raise HTTPException(404, f"There is no model {name}. This server has {', '.join(self._loaded)}.")
        one = self._loaded[name]
        return name, one.model, one.processor or one.tokenizer

    def load_model_and_processor(self, name: str, *_: Any, **__: Any) -> tuple[Any, Any]:  # type: ignore[override]
        return self.resolve(name)[1:]

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        return Modality.VLM if hasattr(model, "get_image_features") else Modality.LLM

    def list_models(self, cache_dir: str | None = None) -> list[dict]:
        return [{"id": name, "object": "model", "created": self._created, "owned_by": "local"} for name in self._loaded]

    def shutdown(self) -> None:
        """Keep the models: the process ends with the server."""


class State(GenerationState):
    """The managers of the models.

    Args:
        loaded: the models by their names.
        limits: what the requests of a model may take together.
    """

    def __init__(self, loaded: Mapping[str, Loaded], limits: Limits) -> None:
        super().__init__()
        self.managers = {name: SharedManager(one.model, one.tokenizer, limits) for name, one in loaded.items()}

    def use_continuous_batching(self, model: Any, modality: Modality) -> bool:
        """False: the handlers then hand over tensors. Requests share calls all the same."""
        return False

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        return self.managers[model_id]

    def is_cb_alive(self) -> bool:
        """Whether every model takes requests, for `/health`."""
        return all(manager.is_alive() for manager in self.managers.values())

    def shutdown(self) -> None:
        """Refuse further requests, and wait for those that run."""
        for manager in self.managers.values():
            manager.stop()
