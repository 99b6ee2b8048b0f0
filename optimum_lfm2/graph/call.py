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
        shape: int64 (3), [batch_size, sequence_length, -1].
        mask: int64 (batch_size, past_sequence_length + sequence_length).
        new: the mask of the new tokens, int64 (batch_size, sequence_length).
        positions: of the new tokens, int64 (batch_size, sequence_length): a row counts its unmasked tokens.
        columns: int64 (sequence_length), 0 to sequence_length - 1.
        dtype: of the hidden states.
    """

    shape: torch.Tensor
    mask: torch.Tensor
    new: torch.Tensor
    positions: torch.Tensor
    columns: torch.Tensor
    dtype: torch.dtype

    @property
    def end(self) -> torch.Tensor:
        """How many new columns a row has up to its last unmasked token, int64 (batch_size, 1)."""
        return (self.new * (self.columns + 1)).amax(1, keepdim=True)


def read_call(token_shape: torch.Tensor, attention_mask: torch.Tensor, dtype: torch.dtype) -> Call:
    """The call of new tokens under a mask.

    Args:
        token_shape: a tensor whose first two axes are batch_size and sequence_length: ids or embeddings.
        attention_mask: int64 (batch_size, past_sequence_length + sequence_length), 0 hides a token.
    """
    sequence = token_shape.shape[1]
    first = attention_mask.shape[1] - sequence
    return Call(
        shape=shapes.row_shape(token_shape),
        mask=attention_mask,
        new=attention_mask[:, first:],
        positions=(attention_mask.cumsum(1) - 1).clamp(min=0)[:, first:],
        columns=torch.arange(sequence),
        dtype=dtype,
    )


@dataclass(frozen=True)
class ConvCall:
    """What convolutions share.

    Attributes:
        shape: int64 (3), [batch_size, sequence_length, -1].
        visible: bool (tokens, 1), whether a new token is unmasked.
        end: int64 (batch_size, 1), how many new columns the row has up to its last unmasked token.
        windows: int64 (sequence_length, conv_L_cache): which columns, of state and new tokens, a new token mixes.
    """

    shape: torch.Tensor
    visible: torch.Tensor
    end: torch.Tensor
    windows: torch.Tensor


def conv_call(call: Call, taps: int) -> ConvCall:
    """What convolutions of `taps` columns share."""
    return ConvCall(
        shape=call.shape,
        visible=call.new.reshape(-1, 1) != 0,
        end=call.end,
        windows=call.columns[:, None] + torch.arange(1, taps + 1),
    )


@dataclass(frozen=True)
class Rotation:
    """The angles of the new tokens, for the layers of one rotary table.

    Attributes:
        shape: int64 (3), [batch_size, sequence_length, -1].
        index: int64 (batch_size, sequence_length), counts the tokens of the call: where `cos` and `sin` are read.
        cos, sin: (tokens, head_dim / 2).
    """

    shape: torch.Tensor
    index: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def rotate(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """Any shape of tokens * heads * head_dim elements → rows, rotated."""
        return ops.rotary_embedding(shapes.rows(x, self.shape), self.index, self.cos, self.sin, heads)


def rotation(call: Call, rotary: Rotary) -> Rotation:
    """The angles of the new tokens of a call."""
    batch, sequence = call.new.shape
    cos, sin = ops.rotary_table(call.positions, *rotary, call.dtype)
    return Rotation(call.shape, torch.arange(batch * sequence).reshape(batch, sequence), cos, sin)


@dataclass(frozen=True)
class AttentionCall:
    """What layers of full attention share.

    Attributes:
        rotation: the angles of the new tokens.
        last: int32 (batch_size), the index of the last column, the same for every row.
        total: int32 scalar, the number of columns.
        bias: (batch_size, 1, sequence_length, columns), 0 on visible columns and `ops.MASKED` on others.
    """

    rotation: Rotation
    last: torch.Tensor
    total: torch.Tensor
    bias: torch.Tensor

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past: tuple[torch.Tensor, ...] | None,
        config: PretrainedConfig,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[()]]:
        """Causal attention over all columns: the context, (tokens, heads * head_dim), the present caches, no state.

        Args:
            query, key: rotated rows.
            value: rows.
            past: keys and values, (batch_size, kv_heads, past_sequence_length, head_dim) each, or None.
        """
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
        padding = -dim % ops.HEAD_DIM_MULTIPLE  # zeros that nobody outside sees

        def padded(x: torch.Tensor) -> torch.Tensor:
            if not padding:
                return x
            return shapes.rows(shapes.pad(shapes.flat(x, dim), axis=1, after=padding), self.rotation.shape)

        if padding and past is not None:
            past = tuple(shapes.pad(x, axis=3, after=padding) for x in past)
        context, keys, values = ops.group_query_attention(
            padded(query),
            padded(key),
            padded(value),
            past,
            self.last,
            self.total,
            self.bias,
            heads,
            kv_heads,
            dim**-0.5,
        )
        if padding:
            context, keys, values = (shapes.flat(context, dim + padding)[:, :dim], keys[..., :dim], values[..., :dim])
        return shapes.flat(context, heads * dim), (keys, values), ()


def attention_call(call: Call, rotary: Rotary) -> AttentionCall:
    """What layers of full attention share."""
    sequence = call.new.shape[1]
    nothing = torch.zeros((), dtype=call.dtype)
    masked = torch.where(call.mask == 0, torch.full((), ops.MASKED, dtype=call.dtype), nothing)
    last, total = shapes.lengths(call.mask)
    return AttentionCall(
        rotation=rotation(call, rotary),
        last=last,
        total=total,
        bias=masked[:, None, None, :].expand(-1, 1, sequence, -1),
    )
