"""How a `torch.autograd.Function` becomes an ONNX node in torch's TorchScript exporter.

`forward` computes the value, in eager torch and while torch traces. `symbolic` emits the node. The operators that
compute are in `ops.py`, and those that only move values in `shapes.py`.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch.autograd import Function


class Node(Function):
    """A Function whose `forward` is not traced. The tracer would keep every intermediate value in memory."""

    def __init_subclass__(cls) -> None:
        cls.forward = staticmethod(_untraced(cls.forward))  # type: ignore[method-assign]


def _untraced(forward):
    @functools.wraps(forward)
    def wrapper(*args):
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return forward(*args)
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

    return wrapper


def constant(g, values):
    """Emit an int64 constant: a scalar, or a vector for a list."""
    return g.op("Constant", value_t=torch.tensor(values, dtype=torch.int64))


def none(g):
    """Emit an absent optional input."""
    value = g.op("prim::Constant")
    value.setType(torch._C.OptionalType.ofTensor())
    return value


def either(g, condition, *branches):
    """Emit an `If`: the value that the first branch emits where `condition` holds, and else that of the second."""
    chosen = g.op("If", condition)
    for branch in branches:
        block = chosen.node().addBlock()
        block.registerOutput(branch(replace(g, block=block)))
    return chosen


def typed(*ranks: int | None, like: int = 0, dtype: torch.dtype | None = None):
    """Decorate a `symbolic` so that it declares the types of its outputs.

    torch knows the types of its own operators alone, and warns once for every other node (torch 2.13).

    Args:
        ranks: the rank of each output. None stands for the rank of the first argument.
        like: the index of the argument whose dtype the outputs have.
        dtype: the dtype of the outputs, in place of an argument's.
    """

    def decorator(symbolic):
        @functools.wraps(symbolic)
        def wrapper(g, *args):
            emitted = symbolic(g, *args)
            source = dtype or args[like]
            seen = source if isinstance(source, torch.dtype) else source.type().dtype()
            for value, rank in zip(emitted if isinstance(emitted, tuple) else (emitted,), ranks, strict=True):
                count = args[0].type().dim() if rank is None else rank
                example = torch._C.TensorType.create_from_tensor(torch.empty([1] * count, dtype=seen))
                value.setType(example.with_sizes([None] * count))
            return emitted

        return wrapper

    return decorator
