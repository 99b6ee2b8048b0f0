"""What the layers of one call have in common: its rows, as `attention_mask` describes them.

One rule everywhere: only `attention_mask` decides what a row sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from optimum_lfm2.caches import head_dim
from optimum_lfm2.graph import ops, shapes


# Inverse frequencies, float32 (head_dim / 2), and the factor of cosine and sine; both from transformers' own module.
Rotary = tuple[torch.Tensor, float]


@dataclass(frozen=True)
class Call:
    """One call of the graph.

    Attributes:
        mask: int64 (batch_size, past_sequence_length + sequence_length).
        new: the mask of the new tokens, int64 (batch_size, sequence_length).
        positions: the positions of the new tokens, int64 (batch_size, sequence_length). A row counts its unmasked ones.
        columns: the new columns counted from 1, int64 (sequence_length).
        dtype: the dtype of the hidden states.
    """

    mask: torch.Tensor
    new: torch.Tensor
    positions: torch.Tensor
    columns: torch.Tensor
    dtype: torch.dtype

    @property
    def end(self) -> torch.Tensor:
        """The number of new columns up to a row's last unmasked token, int64 (batch_size, 1)."""
        return (self.new * self.columns).amax(1, keepdim=True)


def read_call(token_shape: torch.Tensor, attention_mask: torch.Tensor, dtype: torch.dtype) -> Call:
    """Describe a call of new tokens under a mask.

    Args:
        token_shape: a tensor whose first two axes are batch_size and sequence_length: ids or embeddings.
        attention_mask: int64 (batch_size, past_sequence_length + sequence_length), 0 hides a token.
    """
    return Call(
        mask=attention_mask,
        new=shapes.last(attention_mask, token_shape),
        positions=shapes.last((attention_mask.cumsum(1) - 1).clamp(min=0), token_shape),
        columns=shapes.counted(token_shape),
        dtype=dtype,
    )


@dataclass(frozen=True)
class ConvCall:
    """What all convolutions of a call share. The columns are those of the state, then the new tokens.

    Attributes:
        visible: whether a new token is unmasked, bool (batch_size, sequence_length, 1).
        windows: the columns that each new token mixes, int64 (sequence_length, conv_L_cache).
        kept: the columns that become the row's next state, int64 (batch_size, conv_L_cache, 1).
        taps: the columns of a kernel. A shape would be a traced value.
    """

    visible: torch.Tensor
    windows: torch.Tensor
    kept: torch.Tensor
    taps: int


def conv_call(call: Call, taps: int) -> ConvCall:
    """Compute what all convolutions of a call share. Their kernels have `taps` columns."""
    width = torch.arange(taps)
    return ConvCall(
        visible=call.new[:, :, None].to(torch.bool),
        windows=call.columns[:, None] + width,
        kept=(call.end + width)[:, :, None],
        taps=taps,
    )


@dataclass(frozen=True)
class Rotation:
    """The angles of the new tokens, for the layers of one rotary table.

    Attributes:
        index: the row of `cos` and `sin` for each token, int64 (batch_size, sequence_length).
        cos, sin: the cosines and sines, (batch_size * sequence_length, head_dim / 2) each.
    """

    index: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def rotate(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """Rotate the heads of `x`, (batch_size, sequence_length, heads * head_dim)."""
        return ops.rotary_embedding(x, self.index, self.cos, self.sin, heads)


def rotation(call: Call, rotary: Rotary) -> Rotation:
    """Compute the angles of the new tokens of a call."""
    return Rotation(shapes.numbered(call.new), *ops.rotary_table(call.positions, *rotary, call.dtype))


def padded_heads(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Pad heads with zeros to a width that GroupQueryAttention takes.

    (batch_size, sequence_length, heads * dim) → (batch_size, sequence_length, heads * padded dim).
    """
    padding = -dim % ops.HEAD_DIM_MULTIPLE
    if not padding:
        return x
    return shapes.resized(shapes.pad(shapes.resized(x, (0, 0, -1, dim)), axis=3, after=padding), (0, 0, -1))


def narrowed_heads(x: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """Undo `padded_heads` for this number of heads."""
    padding = -dim % ops.HEAD_DIM_MULTIPLE
    if not padding:
        return x
    return shapes.resized(shapes.resized(x, (0, 0, heads, dim + padding))[..., :dim], (0, 0, heads * dim))


@dataclass(frozen=True)
class AttentionCall:
    """What all layers of full attention in a call share.

    Attributes:
        rotation: the angles of the new tokens; None where positions do not count.
        last: the index of the last column, int32 (batch_size). It is the same for every row.
        total: the number of columns, an int32 scalar.
        bias: 0 on visible columns and `ops.MASKED` on others, (batch_size, 1, sequence_length, columns).
        causal: whether later tokens are hidden from a token.
    """

    rotation: Rotation | None
    last: torch.Tensor
    total: torch.Tensor
    bias: torch.Tensor
    causal: bool = True

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past: tuple[torch.Tensor, ...] | None,
        config: PretrainedConfig,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[()]]:
        """Compute attention over all columns. Return the context, as wide as the query, the present caches, no states.

        Args:
            query: (batch_size, sequence_length, heads * head_dim), rotated.
            key, value: (batch_size, sequence_length, kv_heads * head_dim), the key rotated.
            past: keys and values, (batch_size, kv_heads, past_sequence_length, head_dim) each, or None.
            config: the model's configuration.
            scale: the factor of the scores; None for `head_dim ** -0.5`.
        """
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
        padding = -dim % ops.HEAD_DIM_MULTIPLE  # zeros that nobody outside sees

        if padding and past is not None:
            past = tuple(shapes.pad(x, axis=3, after=padding) for x in past)
        context, keys, values = ops.group_query_attention(
            padded_heads(query, dim),
            padded_heads(key, dim),
            padded_heads(value, dim),
            past,
            self.last,
            self.total,
            self.bias,
            heads,
            kv_heads,
            dim**-0.5 if scale is None else scale,
            self.causal,
        )
        if padding:
            keys, values = keys[..., :dim], values[..., :dim]
        return narrowed_heads(context, heads, dim), (keys, values), ()


def attention_call(call: Call, rotary: Rotary | None) -> AttentionCall:
    """Compute what all layers of full attention share. Without a rotary table, positions do not count."""
    nothing = torch.zeros((), dtype=call.dtype)
    masked = torch.where(call.mask == 0, torch.full((), ops.MASKED, dtype=call.dtype), nothing)
    last, total = shapes.lengths(call.mask)
    return AttentionCall(
        rotation=None if rotary is None else rotation(call, rotary),
        last=last,
        total=total,
        bias=shapes.repeated(masked, call.new),
    )
