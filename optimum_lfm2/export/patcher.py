"""The forward that torch traces in place of the model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from math import prod
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_lfm2.caches import flatten
from optimum_lfm2.graph import ops
from optimum_lfm2.graph.call import read_call
from optimum_lfm2.graph.decoder import Decoder, language_model
from optimum_lfm2.weights.checkpoint import stored_tensors, tied_names


Caches = Sequence[tuple[torch.Tensor, ...]]


class GraphPatcher:
    """Context manager that replaces `model.forward` by a forward with the graph's signature.

    The new forward has a placeholder for each weight. Only the trace uses it.

    Attributes:
        weights: each parameter by its name in the checkpoint. They come from the model's `checkpoint` if it has one,
            else from its own parameters.
    """

    def __init__(self, config: Any, model: PreTrainedModel, model_kwargs: dict[str, Any] | None = None) -> None:
        self._onnx_config = config
        self._model: Any = model
        self._parameters = stored_tensors(model)
        # Read them now: while torch traces, a shape consists of traced values.
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        self._tied = tied_names(model)
        self.weights = getattr(model, "checkpoint", self._parameters)

    forward: Callable[..., Any]

    def __enter__(self) -> GraphPatcher:
        self._own_forward = vars(self._model).get("forward")  # an instance has one only if someone set it
        self._model.forward = self.forward
        return self

    def __exit__(self, *exception: object) -> None:
        del self._model.forward
        if self._own_forward is not None:
            self._model.forward = self._own_forward

    def _placeholder(self, *names: str, kernel: bool = False) -> torch.Tensor:
        rows, *others = self._shapes[names[0]]
        shape = (prod(others), rows) if kernel else (sum(self._shapes[name][0] for name in names), *others)
        dtype = self._parameters[names[0]].dtype
        return ops.parameter([self._tied[name] for name in names], shape, dtype, kernel)


class Lfm2ModelPatcher(GraphPatcher):
    """The patcher for a whole decoder or encoder: embedding, layers and head."""

    def __init__(self, config: Any, model: PreTrainedModel, model_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(config, model, model_kwargs)
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        member = config.member
        self._decoder = Decoder(member, model.config, member.rotary(model), prefix)
        self._head = member.heads.get(config.task)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Caches | None = None,
        num_logits_to_keep: torch.Tensor | None = None,
    ) -> Any:
        """Return the graph's outputs in order.

        The first is the head's. With past, the present caches follow, and then the columns that the call adds to states
        if the options ask for them.

        Args:
            input_ids: int64 (batch_size, sequence_length).
            attention_mask: int64 (batch_size, past_sequence_length + sequence_length).
            past_key_values: a tuple of caches a layer, or None for a graph without cache inputs.
            num_logits_to_keep: an int64 scalar, or None for a graph without logits. 0 means all.
        """
        if self._head is not None:
            call = read_call(input_ids, attention_mask, self._model.dtype)
            hidden = self._decoder.embed(input_ids, self._placeholder)
            hidden, *_ = self._decoder.layers(hidden, call, None, None, self._placeholder)
            return self._head.forward(hidden, call, self._placeholder, self._model.config)
        return self._run(input_ids, attention_mask, past_key_values, num_logits_to_keep, self._decoder.embed)

    def _run(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        past: Caches | None,
        keep: torch.Tensor | None,
        enter: Callable[..., torch.Tensor],
    ) -> Any:
        weight, dtype = self._placeholder, self._model.dtype
        output, present, columns = language_model(self._decoder, tokens, mask, past, keep, weight, dtype, enter)
        if not self._onnx_config.use_past:
            return output
        return (output, *flatten(present), *(flatten(columns) if self._onnx_config.gives_columns else ()))


class DecoderPatcher(Lfm2ModelPatcher):
    """The patcher for a decoder that takes embeddings. They are float32, whatever dtype the decoder computes in."""

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Caches | None = None,
        num_logits_to_keep: torch.Tensor | None = None,
    ) -> Any:
        """Return what the base class returns. `inputs_embeds` is float32 (batch_size, sequence_length, hidden_size)."""
        embeds = inputs_embeds.to(self._model.dtype)
        return self._run(embeds, attention_mask, past_key_values, num_logits_to_keep, self._decoder.enter)


class EmbeddingPatcher(Lfm2ModelPatcher):
    """The patcher for a decoder's embedding alone."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Int64 (batch_size, sequence_length) → float32 (batch_size, sequence_length, hidden_size)."""
        return self._decoder.embed(input_ids, self._placeholder).to(torch.float32)


class VisionPatcher(GraphPatcher):
    """The patcher for a vision tower with its projector."""

    def __init__(self, config: Any, model: PreTrainedModel, model_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(config, model, model_kwargs)
        tower = config.member.tower

        def forward(*pictures: torch.Tensor) -> torch.Tensor:
            """Take the inputs of the tower in order, and return what `Tower.features` does."""
            return tower.features(pictures, self._placeholder, self._shapes, model.config, model.dtype)

        # torch reads the inputs' names from the signature.
        names = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in tower.inputs(model.config)]
        forward.__signature__ = Signature(names)  # type: ignore[attr-defined]
        self.forward = forward
