"""Operators of a vision tower. Each function is one ONNX node, or a few, as in `ops.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from optimum_lfm2.graph.ops import ONNX_TYPE
from optimum_lfm2.graph.tracing import Node, constant, either, none, typed


class _LayerNorm(Node):
    @staticmethod
    def forward(ctx, x, weight, bias, epsilon):
        return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    @staticmethod
    @typed(None)
    def symbolic(g, x, weight, bias, epsilon):
        return g.op("LayerNormalization", x, weight, bias, axis_i=-1, epsilon_f=epsilon, stash_type_i=1)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Layer norm over the last axis, computed in float32."""
    return _LayerNorm.apply(x, weight, bias, epsilon)


class _Gelu(Node):
    @staticmethod
    def forward(ctx, x):
        return F.gelu(x)

    @staticmethod
    @typed(None)
    def symbolic(g, x):
        return g.op("com.microsoft::Gelu", x)


class _TanhGelu(Node):
    @staticmethod
    def forward(ctx, x):
        return F.gelu(x, approximate="tanh")

    @staticmethod
    @typed(None)
    def symbolic(g, x):
        return g.op("com.microsoft::FastGelu", x)


# By transformers' names. `Gelu` of ONNX itself needs opset 20.
ACTIVATIONS = {"gelu": _Gelu.apply, "gelu_pytorch_tanh": _TanhGelu.apply}


def _attended(g, inputs, bias, heads, scale):
    inputs = (*inputs, none(g), none(g), bias)
    scaled = {} if scale is None else {"scale_f": scale}
    return g.op("com.microsoft::MultiHeadAttention", *inputs, num_heads_i=heads, **scaled)


class _Attention(Node):
    @staticmethod
    def forward(ctx, query, key, value, bias, heads, scale):
        return torch.zeros_like(query)

    @staticmethod
    @typed(3)
    def symbolic(g, query, key, value, bias, heads, scale):
        return _attended(g, (query, key, value), bias, heads, scale)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    heads: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of all patches to all: (tiles, patches, width) each → (tiles, patches, width).

    Args:
        bias: added to the scores, (tiles, 1, patches, patches).
        scale: the factor of the scores; None for the width of a head to the power of -0.5.
    """
    return _Attention.apply(query, key, value, bias, heads, scale)


class _AttentionOfFrames(Node):
    @staticmethod
    def forward(ctx, query, key, value, even, seats, masked, seat, heads, scale):
        return torch.zeros_like(query)

    @staticmethod
    @typed(3)
    def symbolic(g, query, key, value, even, seats, masked, seat, heads, scale):
        def flat(g, x):
            return g.op("Reshape", x, constant(g, [1, -1, 0]))

        def as_they_lie(g):
            sizes = g.op("Concat", g.op("Shape", seats), constant(g, [-1]), axis_i=0)
            seated = (g.op("Reshape", x, sizes) for x in (query, key, value))
            return flat(g, _attended(g, seated, none(g), heads, scale))

        def padded(g):
            one = constant(g, [1])
            sizes = g.op("Concat", one, one, g.op("Shape", seats, start_i=1), one, axis_i=0)
            bias = g.op("Expand", g.op("Unsqueeze", masked, constant(g, [1, 2])), sizes)
            rows = (g.op("Squeeze", x, constant(g, [0])) for x in (query, key, value))
            seated = (g.op("Gather", x, seats, axis_i=0) for x in rows)
            return g.op("Gather", flat(g, _attended(g, seated, bias, heads, scale)), seat, axis_i=1)

        return either(g, even, as_they_lie, padded)


def attention_of_frames(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    even: torch.Tensor,
    seats: torch.Tensor,
    masked: torch.Tensor,
    seat: torch.Tensor,
    heads: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of all patches of a frame to each other: (1, patches, width) each → (1, patches, width).

    Without a bias onnxruntime's kernel on the CPU (1.32) never holds all scores at once. So only frames of several
    sizes get one.

    Args:
        even: whether all frames have the same size, a bool scalar.
        seats: the patches of each frame, int64 (frames, longest frame). A shorter frame ends in copies of patch 0.
        masked: 0 on patches and `ops.MASKED` on such copies, (frames, longest frame).
        seat: where each patch is among all `seats`, int64 (patches).
        scale: the factor of the scores; None for the width of a head to the power of -0.5.
    """
    return _AttentionOfFrames.apply(query, key, value, even, seats, masked, seat, heads, scale)


class _Divided(Node):
    @staticmethod
    def forward(ctx, x, y):
        return x // y, x % y

    @staticmethod
    def symbolic(g, x, y):
        rank = max(x.type().dim(), y.type().dim())
        return typed(rank, rank)(lambda g, x, y: (g.op("Div", x, y), g.op("Mod", x, y)))(g, x, y)


def divided(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quotient and remainder of integers that are not negative. The shapes are broadcast."""
    return _Divided.apply(x, y)


class _Counted(Node):
    @staticmethod
    def forward(ctx, count):
        return torch.arange(int(count))

    @staticmethod
    @typed(1)
    def symbolic(g, count):
        return g.op("Range", constant(g, 0), count, constant(g, 1))


def counted(count: torch.Tensor) -> torch.Tensor:
    """Return 0 to `count` - 1, int64 (count), for an int64 scalar."""
    return _Counted.apply(count)


class _Chosen(Node):
    @staticmethod
    def forward(ctx, x, condition):
        return x[condition]

    @staticmethod
    @typed(2)
    def symbolic(g, x, condition):
        return g.op("Compress", x, condition, axis_i=0)


def chosen(x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """The rows of (rows, width) where `condition`, bool (rows), holds."""
    return _Chosen.apply(x, condition)


class _Gathered(Node):
    @staticmethod
    def forward(ctx, x, index):
        return x[index].flatten(1)

    @staticmethod
    @typed(2)
    def symbolic(g, x, index):
        return g.op("Flatten", g.op("Gather", x, index, axis_i=0), axis_i=1)


def gathered(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows side by side: (rows, width), int64 (tokens, count) → (tokens, count * width)."""
    return _Gathered.apply(x, index)


class _Weighted(Node):
    @staticmethod
    def forward(ctx, weights, table):
        return weights.flatten(2) @ table.float()

    @staticmethod
    @typed(3, dtype=torch.float32)
    def symbolic(g, weights, table):
        flat = g.op("Reshape", weights, constant(g, [0, -1, table.type().sizes()[0]]))
        return g.op("MatMul", flat, g.op("Cast", table, to_i=ONNX_TYPE[torch.float32]))


def weighted(weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Sums of a table's rows: float32 (tiles, patches, ...) of as many weights as rows → (tiles, patches, width)."""
    return _Weighted.apply(weights, table)
