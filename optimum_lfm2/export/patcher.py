"""What Optimum calls for the model's own forward: the graph while it traces, transformers while it validates."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from optimum_lfm2.caches import flatten
from optimum_lfm2.export.reference import fill_visible
from optimum_lfm2.graph import ops
from optimum_lfm2.graph.decoder import FeedForward, decoder, feed_forward
from optimum_lfm2.graph.experts import sparse_feed_forward
from optimum_lfm2.weights.blocks import dequantized
from optimum_lfm2.weights.checkpoint import stored_tensors, tied_names


Caches = Sequence[tuple[torch.Tensor, ...]]


class Lfm2ModelPatcher:
    """Context manager that replaces `model.forward` by one with the graph's signature.

    Traced, it runs `graph.decoder` with a placeholder for each weight. Called, it answers with transformers' own
    forward, so that Optimum's validation does not compare our graph with itself.
    """

    def __init__(self, config: Any, model: PreTrainedModel, model_kwargs: dict[str, Any] | None = None) -> None:
        self._onnx_config = config
        self._model: Any = model
        self._parameters = stored_tensors(model)
        # Read here: while torch traces, a shape is made of traced values.
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        self._tied = tied_names(model)
        self._rotary = _rotary(model)
        self._feed_forwards = self.feed_forwards(model.config)

    def feed_forwards(self, config: PretrainedConfig) -> Sequence[FeedForward]:
        """What follows the mixing of tokens, one a layer."""
        return [feed_forward] * config.num_hidden_layers

    def __enter__(self) -> Lfm2ModelPatcher:
        self._onnx_config.weights = getattr(self._model, "checkpoint", self._parameters)
        self._own_forward = vars(self._model).get("forward")  # on the instance, which has none unless someone set it
        self._model.forward = self.forward
        return self

    def __exit__(self, *exception: object) -> None:
        del self._model.forward
        if self._own_forward is not None:
            self._model.forward = self._own_forward

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Caches | None = None,
        num_logits_to_keep: torch.Tensor | None = None,
    ) -> Any:
        if torch.jit.is_tracing():
            output, present = self._decode(
                self._placeholder, input_ids, attention_mask, past_key_values, num_logits_to_keep
            )
            return (output, *flatten(present)) if self._onnx_config.use_past else output

        with dequantized(self._model, self._onnx_config.scheme):
            output, present = self._decode(self._weight, input_ids, attention_mask, past_key_values, num_logits_to_keep)
            del self._model.forward
            try:
                fill_visible(self._model, input_ids, attention_mask, past_key_values, output, present)
            finally:
                self._model.forward = self.forward
        name, *presents = self._onnx_config.outputs
        values = dict(zip([name, *presents], [output, *flatten(present)], strict=False))
        self._onnx_config.magnitudes = {key: float(value.abs().max()) for key, value in values.items()}
        return {name: output, "past_key_values": present} if self._onnx_config.use_past else {name: output}

    def _decode(
        self,
        weight: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: Caches | None,
        num_logits_to_keep: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Caches]:
        model = self._model
        return decoder(
            input_ids,
            attention_mask,
            past,
            num_logits_to_keep,
            weight=weight,
            feed_forwards=self._feed_forwards,
            config=model.config,
            rotary=self._rotary,
            prefix="model." if hasattr(model, "lm_head") else "",
            dtype=model.dtype,
        )

    def _weight(self, name: str, kernel: bool = False) -> torch.Tensor:
        parameter = operator.attrgetter(name)(self._model)
        return parameter[:, 0].T if kernel else parameter

    def _placeholder(self, name: str, kernel: bool = False) -> torch.Tensor:
        shape = self._shapes[name]
        shape = (shape[2], shape[0]) if kernel else shape
        return ops.parameter(self._tied[name], shape, self._parameters[name].dtype, kernel)


class Lfm2MoeModelPatcher(Lfm2ModelPatcher):
    """The same for a model whose later layers have experts."""

    def feed_forwards(self, config: PretrainedConfig) -> Sequence[FeedForward]:
        sparse = partial(sparse_feed_forward, config=config)
        dense = min(config.num_dense_layers, config.num_hidden_layers)
        return (*[feed_forward] * dense, *[sparse] * (config.num_hidden_layers - dense))


def _rotary(model: Any) -> tuple[torch.Tensor, float]:
    # The module has one name in dense models and another in those with experts.
    module = next(child for child in getattr(model, "model", model).children() if hasattr(child, "inv_freq"))
    rotary = type(module)(model.config)  # anew, for the model may be on the meta device
    return rotary.inv_freq.float(), rotary.attention_scaling
