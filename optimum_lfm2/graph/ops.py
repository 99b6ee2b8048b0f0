"""What the graph computes: each function is one ONNX node, or a few.

`forward` runs while torch traces, where only shapes and dtypes count.

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
HEAD_DIM_MULTIPLE = 8  # of the heads that GroupQueryAttention takes
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
    """A weight by its name in the checkpoint, or several joined along their first axis.

    A depthwise `kernel`, in the checkpoint (width, 1, taps), becomes (taps, width).
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
    """(vocabulary, width), (batch_size, sequence_length) → (batch_size, sequence_length, width)."""
    return _Embedding.apply(table, ids)


def is_placeholder(weight: torch.Tensor) -> bool:
    """Whether a weight is what `parameter` gives. Its products are zeros: torch would copy it to compute them."""
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
    """(..., in), (out, in), (out) → (..., out). How the product is computed, the form of the stored weight decides."""
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
    """Root mean square norm over the last axis, computed in float32."""
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
    """`rms_norm(x + skip)` and `x + skip`, in one pass over the hidden state."""
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
    """`x * sigmoid(x)`; ONNX Runtime fuses the pair when it loads the graph."""
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
    """Cosines and sines of the call's own positions, (tokens, head_dim / 2) each.

    They are computed in float32 as transformers does, a few hundred numbers a call, in place of a table of all
    positions that would add 32 MB to every file.
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
    """Rotate rows of `num_heads` heads by the tables' angles at `index`, (batch, sequence). Halves, not pairs."""
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
    """Attention of rows over the cache and themselves; returns the context and the present keys and values.

    Args:
        query: (batch_size, sequence_length, num_heads * head_dim), rotated.
        key, value: (batch_size, sequence_length, kv_heads * head_dim), the key rotated.
        past: keys and values, (batch_size, kv_heads, past_sequence_length, head_dim) each, or None.
        last: int32 (batch_size), index of the last column: the same for every row, since `bias` hides padding.
        total: int32 scalar, past_sequence_length + sequence_length.
        bias: added to the scores, (batch_size, 1, sequence_length, total).
        causal: whether a token sees no later token. Otherwise onnxruntime has to be 1.29.1 or later.
    """
    past_key, past_value = past if past is not None else (None, None)
    return _GroupQueryAttention.apply(
        query, key, value, past_key, past_value, last, total, bias, num_heads, kv_heads, scale, causal
    )
