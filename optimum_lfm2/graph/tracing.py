"""How a torch function becomes an ONNX node: a `torch.autograd.Function` that torch's TorchScript exporter asks.

`forward` runs while torch traces, and in eager torch; `symbolic` emits the node. The vocabulary itself is in `ops.py`,
what computes, and `shapes.py`, what only moves values.
"""

from __future__ import annotations

import functools

import torch
from torch.autograd import Function


class Node(Function):
    """A Function whose `forward` the tracer does not look into: it would keep every intermediate value."""

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
    return g.op("Constant", value_t=torch.tensor(values, dtype=torch.int64))


def none(g):
    """An absent optional input."""
    value = g.op("prim::Constant")
    value.setType(torch._C.OptionalType.ofTensor())
    return value


def typed(*ranks: int, like: int = 0, dtype: torch.dtype | None = None):
    """Declare what a symbolic emits: the rank of each output, and its dtype or the argument that has it too.

    torch knows the types of no operators but its own, and says so once a node.
    """

    def decorator(symbolic):
        @functools.wraps(symbolic)
        def wrapper(g, *args):
            emitted = symbolic(g, *args)
            source = dtype or args[like]
            seen = source if isinstance(source, torch.dtype) else source.type().dtype()
            for value, rank in zip(emitted if isinstance(emitted, tuple) else (emitted,), ranks, strict=True):
                example = torch._C.TensorType.create_from_tensor(torch.empty([1] * rank, dtype=seen))
                value.setType(example.with_sizes([None] * rank))
            return emitted

        return wrapper

    return decorator
