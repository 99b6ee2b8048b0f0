"""Run transformers' model with the weights of one layer in memory at a time, so that it can be of any size.

The weights have the values of the exported file: rounded to its dtype, and quantised and dequantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_lfm2.families import member_of
from optimum_lfm2.graph.experts import expert_blocks
from optimum_lfm2.weights.blocks import Blocks, Scheme, module_blocks, rounded
from optimum_lfm2.weights.checkpoint import stored_tensors, tied_names
from optimum_lfm2.weights.coded import is_kept
from optimum_lfm2.weights.experts import PACKED, ExpertWeights, is_packed


class StandIns(Mapping[str, Any]):
    """Maps the name of each stored tensor to its values in the exported file, float32.

    Args:
        model: a model of transformers. Its names, shapes and modules are read, its weights are not.
        weights: each parameter by its name. A parameter of experts gives one matrix an index.
        scheme: how the file is quantised. None means that it is not.
    """

    def __init__(self, model: PreTrainedModel, weights: Mapping[str, Any], scheme: Scheme | None) -> None:
        self._model, self._weights, self._scheme = model, weights, scheme
        self._tied = tied_names(model)
        self._shapes = {name: tensor.shape for name, tensor in stored_tensors(model).items()}
        blocks = {} if scheme is None else module_blocks(model, scheme)
        self._blocks = {f"{name}.weight": blocks.get(module) for name, module in model.named_modules()}
        self._kept: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> Any:
        stored = self._tied[name]
        if stored in self._kept:
            return self._kept.pop(stored)  # a tied tensor is read twice: by the embedding and by the head
        if is_packed(name):
            weight, shape = self._weights[stored], self._shapes[name]
            config = self._model.config
            widths = config.hidden_size, config.moe_intermediate_size
            names = [f"{name.rpartition('.')[0]}.{kind}" for kind in PACKED]
            blocks = expert_blocks(self._scheme, widths, names)
            return ExpertWeights(lambda index: self._rounded(stored, weight[index].detach(), blocks), shape)
        value = self._rounded(stored, self._weights[stored].detach(), self._blocks.get(name))
        if sum(other == stored for other in self._tied.values()) > 1:
            self._kept[stored] = value
        return value

    def _rounded(self, stored: str, weight: torch.Tensor, blocks: Blocks | None) -> torch.Tensor:
        # Of codes that went over as they are, the reference is what the checkpoint's own format says.
        if blocks is None or is_kept(self._weights, stored, blocks):
            return weight.float()
        return rounded(weight, blocks).float()

    def __contains__(self, name: object) -> bool:
        return name in self._tied  # Mapping's own reads and quantises the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._tied)

    def __len__(self) -> int:
        return len(self._tied)


@contextmanager
def streamed(model: Any, weights: Mapping[str, Any]) -> Iterator[None]:
    """Within the `with` block, `model` computes with `weights`, and holds those of one unit at a time.

    Of experts it holds one matrix at a time.

    Args:
        model: a model of transformers on the meta device. Buffers that no checkpoint stores hold their values.
        weights: the stored tensors by name, float32. transformers' experts index an `ExpertWeights`, which reads one
            matrix an index.
    """
    with ExitStack() as stack:
        stack.enter_context(experts_one_by_one(model))
        for loan in loans(model, weights):
            stack.callback(loan.unit.register_forward_pre_hook(lambda *_, loan=loan: loan.take()).remove)
            stack.callback(loan.unit.register_forward_hook(lambda *_, loan=loan: loan.give_back()).remove)
            stack.callback(loan.give_back)  # after a failure
        yield


def loans(model: Any, weights: Mapping[str, Any]) -> list[Loan]:
    """Return a loan for each unit of a model: the embedding, the layers, the final norm, the head."""
    decoder = model.base_model
    units = [decoder.embed_tokens, *decoder.layers, getattr(decoder, member_of(model.config).final_norm)]
    units += [head for head in model.children() if decoder is not model and head is not decoder]
    names = {module: name for name, module in model.named_modules()}
    return [Loan(unit, names[unit], weights) for unit in units]


@contextmanager
def experts_one_by_one(model: Any) -> Iterator[None]:
    """Choose transformers' eager experts. Its other implementations take the matrices of all experts at once."""
    before = getattr(model.config, "_experts_implementation", None)
    if before is None:
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


class Loan:
    """Gives a module of a model its weights for a time.

    Args:
        unit: the module.
        name: its name in the model.
        weights: the stored tensors by name, float32.
    """

    def __init__(self, unit: torch.nn.Module, name: str, weights: Mapping[str, Any]) -> None:
        self.unit = unit
        self._name, self._weights = name, weights
        self._taken: list[tuple[dict[str, Any], Any, str, Any]] = []

    def take(self) -> None:
        """Read the weights, and put them into the module."""
        for path, module in self.unit.named_modules(prefix=self._name):
            for own in (module._parameters, module._buffers):
                for key in [key for key in own if f"{path}.{key}" in self._weights]:
                    weight = self._weights[f"{path}.{key}"]  # if this fails, the module stays as it was
                    self._taken.append((own, module, key, own.pop(key)))
                    setattr(module, key, weight)

    def give_back(self) -> None:
        """Put back what the module had before."""
        for own, module, key, before in self._taken:
            delattr(module, key)
            own[key] = before
        self._taken.clear()
