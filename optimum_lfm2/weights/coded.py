"""Which codes of a quantised checkpoint go over into an exported file as they are, and which are rounded again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from optimum_lfm2.weights.blocks import Blocks, Scheme, dequantize_tensor, quantize_tensor


LAYER = re.compile(r"^(?:model\.layers\.(\d+)\.)?(.+)$")  # the number of a layer, and its part
# Where a type has no grid in ONNX and nothing is asked for: the values stay within about half a percent.
WIDE = Blocks(8, 32)


def keeping(scheme: Scheme, weights: Mapping[str, Any]) -> Scheme | None:
    """Return a scheme that keeps the codes that a checkpoint has. None if then nothing is quantised.

    A matrix keeps its codes if it has a grid in ONNX, and no more bits than the scheme asks for. Any other matrix that
    is stored in codes is rounded again, as the scheme says; one that asks for float takes `WIDE`.

    Args:
        scheme: what is asked for.
        weights: each parameter by its name: a `Checkpoint`, or tensors.
    """
    stored: dict[str, Blocks] = {}
    for name, grid in getattr(weights, "grids", {}).items():
        asked = scheme.layer(name)
        kept = grid is not None and (asked is None or grid.bits <= asked.bits)
        stored[name.removesuffix(".weight")] = grid if kept else asked or WIDE
    if not stored and scheme.linear is None:
        return None
    return replace(scheme, stored=stored)


def is_kept(weights: Mapping[str, Any], name: str, blocks: Blocks) -> bool:
    """Return whether a matrix that is stored in `blocks` has the codes of its checkpoint."""
    return getattr(weights, "grids", {}).get(name) == blocks


def coded(
    weights: Mapping[str, Any], name: str, blocks: Blocks, expert: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and scales of a matrix: the checkpoint's, or those that `quantize_tensor` finds.

    Args:
        weights: each parameter by its name.
        name: of the parameter.
        blocks: how it is stored.
        expert: which matrix of a parameter that has one for each expert.
    """
    weight = (weights[name] if expert is None else weights[name][expert]).detach()
    if is_kept(weights, name, blocks):
        codes, scales = weights.codes(name, expert)  # type: ignore[attr-defined]
        return codes, scales.to(weight.dtype)
    codes, scales = quantize_tensor(weight, blocks)
    if name in getattr(weights, "kinds", {}):
        again = weights.rounded_again  # type: ignore[attr-defined]
        far = dequantize_tensor(codes, scales, weight.shape[1], blocks).sub_(weight).norm() / weight.norm()
        again[name] = blocks, max(float(far), again.get(name, (blocks, 0.0))[1])
    return codes, scales


def what_was_rounded(checkpoint: Any) -> list[str]:
    """Return a sentence for each type of a GGUF file whose matrices `coded` rounded again, and forget them.

    Args:
        checkpoint: a `Checkpoint`, or tensors by name.
    """
    again: dict[str, tuple[Blocks, float]] = getattr(checkpoint, "rounded_again", {})
    groups: dict[tuple[str, Blocks], dict[str, list[str]]] = {}
    for name, (blocks, _) in again.items():
        number, part = LAYER.findall(name.removesuffix(".weight"))[0]
        groups.setdefault((checkpoint.kinds[name], blocks), {}).setdefault(part, []).append(number)
    said = []
    for (kind, blocks), parts in groups.items():
        where = [
            part if numbers == [""] else f"{part} (layers {', '.join(dict.fromkeys(numbers))})"
            for part, numbers in parts.items()
        ]
        far = [x for name, (own, x) in again.items() if (checkpoint.kinds[name], own) == (kind, blocks)]
        said.append(
            f"{sum(map(len, parts.values()))} matrices of the type {kind} were rounded again, to {blocks.bits} bits in "
            f"blocks of {blocks.block_size}: {', '.join(where)}. They differ from the GGUF file by {max(far):.2%} of "
            "their length at most."
        )
    again.clear()
    return said
