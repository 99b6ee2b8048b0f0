"""transformers' own model with weights that come when a layer runs and go when it has: a gold of any size.

What a layer computes with is what the exported file stands for: weights rounded to its dtype, quantised and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_lfm2.graph.experts import expert_blocks
from optimum_lfm2.weights.blocks import Scheme, module_blocks, rounded
from optimum_lfm2.weights.checkpoint import stored_tensors, tied_names
from optimum_lfm2.weights.experts import ExpertWeights, is_packed


class StandIns(Mapping[str, Any]):
    """Each stored tensor of `model` in float32, with the values that it has in the exported file.

    Args:
        model: names, shapes and kinds of modules; its weights are not looked at.
        weights: each parameter by its name; one of experts gives a matrix for each index.
        scheme: how the file is quantised; None: not at all.
    """

    def __init__(self, model: PreTrainedModel, weights: Mapping[str, Any], scheme: Scheme | None) -> None:
        self._model, self._weights, self._scheme = model, weights, scheme
        self._tied = tied_names(model)
        self._shapes = {name: tensor.shape for name, tensor in stored_tensors(model).items()}
        blocks = {} if scheme is None else module_blocks(model, scheme)
        self._blocks = {f"{name}.weight": blocks.get(module) for name, module in model.named_modules()}

    def __getitem__(self, name: str) -> Any:
        weight, shape = self._weights[self._tied[name]], self._shapes[name]
        if is_packed(name):
            config = self._model.config
            widths = config.hidden_size, config.moe_intermediate_size
            blocks = None if self._scheme is None else expert_blocks(self._scheme, widths)
            return ExpertWeights(lambda index: rounded(weight[index].detach(), blocks).float(), shape)
        return rounded(weight.detach(), self._blocks.get(name)).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tied)

    def __len__(self) -> int:
        return len(self._tied)


@contextmanager
def streamed(model: Any, weights: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, `model` computes with `weights`, of which it holds a layer's, and of experts one matrix.

    Args:
        weights: its stored tensors by name; `ExpertWeights` are read one by one, as transformers' experts index them.
    """
    decoder = getattr(model, "model", model)
    units = [decoder.embed_tokens, *decoder.layers, decoder.embedding_norm]
    units += [model.lm_head] if decoder is not model else []
    names = {module: name for name, module in model.named_modules()}
    implementation = model.config._experts_implementation
    model.set_experts_implementation("eager")  # the others take all experts at once
    with ExitStack() as stack:
        for unit in units:
            loan = _Loan(unit, names[unit], weights)
            stack.callback(unit.register_forward_pre_hook(loan.take).remove)
            stack.callback(unit.register_forward_hook(loan.give_back).remove)
            stack.callback(loan.give_back)  # after a failure
        try:
            yield
        finally:
            model.set_experts_implementation(implementation)


class _Loan:
    """The weights of one unit of a model, between its forward's start and its end."""

    def __init__(self, unit: torch.nn.Module, name: str, weights: Mapping[str, Any]) -> None:
        self._unit, self._name, self._weights = unit, name, weights
        self._taken: list[tuple[dict[str, Any], Any, str, Any]] = []

    def take(self, *_: Any) -> None:
        for path, module in self._unit.named_modules(prefix=self._name):
            for own in (module._parameters, module._buffers):
                for key in [key for key in own if f"{path}.{key}" in self._weights]:
                    weight = self._weights[f"{path}.{key}"]  # may fail: then the module is as it was
                    self._taken.append((own, module, key, own.pop(key)))
                    setattr(module, key, weight)

    def give_back(self, *_: Any) -> None:
        for own, module, key, before in self._taken:
            delattr(module, key)
            own[key] = before
        self._taken.clear()
