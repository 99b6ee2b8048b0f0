"""Operators that compute. Each function becomes one ONNX node, or a few.

`forward` runs while torch traces. Only the shapes and dtypes of its results count then.

Operators of `com.microsoft` are described in onnxruntime's docs/ContribOperators.md. Hidden states are
(batch_size, sequence_length, width) from the embedding to the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from optimum_lfm2.graph.tracing import Node, constant, none, typed


# The domain of placeholders. `export/finish.py` replaces every node of it, so no exported file mentions it.
PLACEHOLDER_DOMAIN = "optimum_lfm2"
LINEAR_OP = "Linear"
HEAD_DIM_MULTIPLE = 8  # GroupQueryAttention takes head_dim in multiples of this (onnxruntime 1.32, CPU)
MASKED = -1e4  # finfo.min overflows to -inf in fp16, and a row without any key then becomes NaN


class _Parameter(Node):
    @staticmethod
    def forward(ctx, names, kernel, shape, dtype):
        # A stride-0 view: the trace needs a shape, never the values.
        return torch.zeros((), dtype=dtype).expand(shape)

    @staticmethod
    def symbolic(g, names, kernel, shape, dtype):
        node = g.op(f"{PLACEHOLDER_DOMAIN}::Parameter", names_s=list(names), kernel_i=kernel)
        return node.setType(torch._C.TensorType.create_from_tensor(torch.zeros((), dtype=dtype).expand(shape)))


def parameter(names: Sequence[str], shape: tuple[int, ...], dtype: torch.dtype, kernel: bool = False) -> torch.Tensor:
    """Return a placeholder for a weight of the checkpoint, or for several joined along their first axis.

    Args:
        names: the names in the checkpoint.
        shape: the shape of the result.
        dtype: the dtype of the result.
        kernel: whether the weight is a depthwise kernel. The checkpoint stores (width, 1, taps), or
            (width, 1, rows, columns) of a grid. The graph has (taps, width).
    """
    return _Parameter.apply(tuple(names), kernel, shape, dtype)


class _Embedding(Node):
    @staticmethod
    def forward(ctx, table, ids):
        return F.embedding(ids, table)

    @staticmethod
    @typed(3)
    def symbolic(g, table, ids):
        return g.op("Gather", table, ids, axis_i=0)


def embedding(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Look up rows: (vocabulary, width), int64 (batch_size, sequence_length) → (batch_size, sequence_length, width)."""
    return _Embedding.apply(table, ids)


def is_placeholder(weight: torch.Tensor) -> bool:
    """Return whether a weight comes from `parameter`.

    torch would copy such a weight to multiply by it, so the products here are zeros.
    """
    return not any(weight.stride())


class _Linear(Node):
    @staticmethod
    def forward(ctx, x, weight, bias):
        if is_placeholder(weight):
            return x.new_zeros(*x.shape[:-1], weight.shape[0])
        return F.linear(x, weight, bias)

    @staticmethod
    @typed(None)
    def symbolic(g, x, weight, bias):
        return g.op(f"{PLACEHOLDER_DOMAIN}::{LINEAR_OP}", x, weight, *(() if bias is None else (bias,)))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply by a weight and add a bias: (..., in), (out, in), (out) → (..., out).

    The node is a placeholder. The form of the stored weight decides which operator replaces it.
    """
    return _Linear.apply(x, weight, bias)


class _RMSNorm(Node):
    @staticmethod
    def forward(ctx, x, weight, epsilon):
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)

    @staticmethod
    @typed(None)
    def symbolic(g, x, weight, epsilon):
        return g.op("SimplifiedLayerNormalization", x, weight, axis_i=-1, epsilon_f=epsilon, stash_type_i=1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root mean square norm over the last axis, computed in float32: (..., width), (width) → (..., width)."""
    return _RMSNorm.apply(x, weight, epsilon)


class _SkipRMSNorm(Node):
    @staticmethod
    def forward(ctx, x, skip, weight, epsilon):
        total = x + skip
        return _RMSNorm.forward(ctx, total, weight, epsilon), total

    @staticmethod
    @typed(None, None)
    def symbolic(g, x, skip, weight, epsilon):
        normed, _mean, _inverse, total = g.op(
            "com.microsoft::SkipSimplifiedLayerNormalization", x, skip, weight, epsilon_f=epsilon, outputs=4
        )
        return normed, total


def skip_rms_norm(
    x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `rms_norm(x + skip)` and `x + skip`, each of the shape of `x`, from one pass over the hidden states."""
    return _SkipRMSNorm.apply(x, skip, weight, epsilon)


class _SiLU(Node):
    @staticmethod
    def forward(ctx, x):
        return F.silu(x)

    @staticmethod
    @typed(None)
    def symbolic(g, x):
        return g.op("Mul", x, g.op("Sigmoid", x))


def silu(x: torch.Tensor) -> torch.Tensor:
    """Return `x * sigmoid(x)`. onnxruntime 1.32 fuses the two nodes to a QuickGelu when it loads the graph."""
    return _SiLU.apply(x)


class _RotaryTable(Node):
    @staticmethod
    def forward(ctx, positions, inverse_frequencies, scaling, dtype):
        angles = positions.reshape(-1, 1).float() * inverse_frequencies
        return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)

    @staticmethod
    @typed(2, 2, like=3)
    def symbolic(g, positions, inverse_frequencies, scaling, dtype):
        column = g.op("Reshape", positions, constant(g, [-1, 1]))
        angles = g.op("Mul", g.op("Cast", column, to_i=1), inverse_frequencies)
        tables = [g.op("Cos", angles), g.op("Sin", angles)]
        if scaling != 1.0:
            factor = g.op("Constant", value_t=torch.tensor(scaling))
            tables = [g.op("Mul", table, factor) for table in tables]
        if dtype is not torch.float32:
            tables = [g.op("Cast", table, to_i=ONNX_TYPE[dtype]) for table in tables]
        return tuple(tables)


ONNX_TYPE = {torch.float32: 1, torch.float16: 10}


def rotary_table(
    positions: torch.Tensor, inverse_frequencies: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines of the angles at the call's positions, (tokens, head_dim / 2) of `dtype` each.

    They are computed in float32, as transformers does. A table of all positions would add 32 MB to every file.

    Args:
        positions: int64 (batch_size, sequence_length).
        inverse_frequencies: float32 (head_dim / 2).
        scaling: the factor of cosines and sines.
        dtype: the dtype of the results.
    """
    return _RotaryTable.apply(positions, inverse_frequencies, scaling, dtype)


class _RotaryEmbedding(Node):
    @staticmethod
    def forward(ctx, x, index, cos, sin, num_heads):
        batch, sequence, width = x.shape
        heads = x.reshape(batch, sequence, num_heads, width // num_heads)
        first, second = heads.chunk(2, dim=-1)
        cos, sin = cos[index].unsqueeze(2), sin[index].unsqueeze(2)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).reshape(x.shape)

    @staticmethod
    @typed(3)
    def symbolic(g, x, index, cos, sin, num_heads):
        return g.op("com.microsoft::RotaryEmbedding", x, index, cos, sin, num_heads_i=num_heads)


def rotary_embedding(
    x: torch.Tensor, index: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Rotate heads. A rotation mixes the two halves of a head, not its neighbouring values.

    Args:
        x: (batch_size, sequence_length, num_heads * head_dim).
        index: the row of the tables for each token, int64 (batch_size, sequence_length).
        cos, sin: the tables, (rows, head_dim / 2) each.
        num_heads: the number of heads.
    """
    return _RotaryEmbedding.apply(x, index, cos, sin, num_heads)


class _GroupQueryAttention(Node):
    @staticmethod
    def forward(ctx, query, key, value, past_key, past_value, last, total, bias, num_heads, kv_heads, scale, causal):
        batch, _, width = query.shape
        present = query.new_zeros(batch, kv_heads, bias.shape[-1], width // num_heads)
        return torch.zeros_like(query), present, present.clone()

    @staticmethod
    @typed(3, 4, 4)
    def symbolic(g, query, key, value, past_key, past_value, last, total, bias, num_heads, kv_heads, scale, causal):
        return tuple(
            g.op(
                "com.microsoft::GroupQueryAttention",
                query,
                key,
                value,
                none(g) if past_key is None else past_key,
                none(g) if past_value is None else past_value,
                last,
                total,
                none(g),
                none(g),
                none(g),
                bias,
                num_heads_i=num_heads,
                kv_num_heads_i=kv_heads,
                scale_f=scale,
                outputs=3,
                **({} if causal else {"causal_i": 0}),
            )
        )


def group_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: tuple[torch.Tensor, ...] | None,
    last: torch.Tensor,
    total: torch.Tensor,
    bias: torch.Tensor,
    num_heads: int,
    kv_heads: int,
    scale: float,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute attention of the new tokens over the cache and over themselves.

    Args:
        query: (batch_size, sequence_length, num_heads * head_dim), rotated.
        key, value: (batch_size, sequence_length, kv_heads * head_dim), the key rotated.
        past: keys and values, (batch_size, kv_heads, past_sequence_length, head_dim) each, or None.
        last: the index of the last column, int32 (batch_size). It is the same for every row: `bias` hides padding.
        total: int32 scalar, past_sequence_length + sequence_length.
        bias: added to the scores, (batch_size, 1, sequence_length, total).
        causal: whether later tokens are hidden from a token. False needs onnxruntime 1.29.1 or later.

    Returns:
        The context, of the shape of `query`, and the present keys and values, (batch_size, kv_heads, total, head_dim).
    """
    past_key, past_value = past if past is not None else (None, None)
    return _GroupQueryAttention.apply(
        query, key, value, past_key, past_value, last, total, bias, num_heads, kv_heads, scale, causal
    )
