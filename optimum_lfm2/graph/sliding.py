"""Sliding attention: a token sees the last `sliding_window` tokens of its row, itself among them.

The cache is a window of fixed width, as a conv state is: the keys and values of the row's own last tokens, whatever
padding lies between them. Which columns of the window hold a token follows from the mask alone: where the row has seen
fewer tokens than the window takes, the first columns hold none.

The new tokens are cut into blocks no longer than the window. A block sees the columns of its own tokens and as many
columns before it as the window has. So the work of a token does not grow with the tokens before it, whether they are in
the cache or in the same call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from optimum_lfm2.caches import head_dim
from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph.call import AttentionCall, Call, Rotary, Rotation, attention_call, rotation


@dataclass(frozen=True)
class SlidingCall:
    """What all layers of sliding attention in a call share.

    The columns are those of the window, then the new tokens. The last block is filled up with copies of the last token.
    No token sees these copies, and their context is dropped. A group is the query heads that share a head of keys.

    Attributes:
        rotation: the angles of the new tokens.
        tokens: the new tokens of each block, int64 (blocks, block).
        seen: the columns that a block sees, int64 (blocks, window + block).
        bias: 0 on visible columns and `ops.MASKED` on others, (batch_size, 1, blocks, group * block, window + block).
        columns: 0 to sequence_length - 1, int64 (sequence_length).
        kept: the columns that become the next window, int64 (batch_size, kv_heads, window, 1).
    """

    rotation: Rotation
    tokens: torch.Tensor
    seen: torch.Tensor
    bias: torch.Tensor
    columns: torch.Tensor
    kept: torch.Tensor

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past: tuple[torch.Tensor, ...] | None,
        config: PretrainedConfig,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Compute attention over the window and the new tokens.

        It uses standard operators. `GroupQueryAttention` refuses several rows with several new tokens on a cache that
        is not empty (onnxruntime 1.32, CPU; tests/test_claims.py), and a window never is.

        Args:
            query: (batch_size, sequence_length, heads * head_dim), rotated.
            key, value: (batch_size, sequence_length, kv_heads * head_dim), the key rotated.
            past: keys and values, (batch_size, kv_heads, window, head_dim) each, or None for an empty window.
            config: the model's configuration.
            scale: the factor of the scores; None for `head_dim ** -0.5`.

        Returns:
            The context, of the shape of `query`. The next window, shaped as `past`. The new keys and values,
            (batch_size, kv_heads, sequence_length, head_dim) each.
        """
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
        group, factor = heads // kv_heads, dim**-0.5 if scale is None else scale

        new = [shapes.resized(rows, (0, 0, kv_heads, dim)).transpose(1, 2) for rows in (key, value)]
        if past is None:
            keys, values = (shapes.pad(x, axis=2, before=config.sliding_window) for x in new)
        else:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))

        # (batch_size, kv_heads, blocks, group * block, head_dim)
        split = shapes.resized(shapes.picked(query * factor, self.tokens, axis=1), (0, 0, 0, kv_heads, group, dim))
        blocks = shapes.resized(split.permute(0, 3, 1, 4, 2, 5), (0, 0, 0, -1, dim))
        scores = blocks @ shapes.picked(keys, self.seen, axis=2).transpose(3, 4) + self.bias
        context = scores.softmax(-1) @ shapes.picked(values, self.seen, axis=2)
        joined = shapes.resized(context, (0, 0, 0, group, -1, dim)).permute(0, 2, 4, 1, 3, 5)
        rows = shapes.picked(shapes.resized(joined, (0, -1, heads * dim)), self.columns, axis=1)
        window = shapes.gathered(keys, self.kept), shapes.gathered(values, self.kept)
        return rows, window, tuple(new)


def sliding_call(call: Call, rotary: Rotary, config: PretrainedConfig) -> SlidingCall:
    """Compute what all layers of sliding attention share, for caches of the window's width."""
    window, kv_heads = config.sliding_window, config.num_key_value_heads
    slots = torch.arange(window)
    columns = call.columns - 1  # from 0 on
    blocks = shapes.blocks(columns, window)  # int64 (blocks, block); may end after the last token
    last = columns.amax()
    tokens = blocks.clamp(max=last)

    # The position of each column's token, (batch_size, window + sequence_length). A column without a token gets one
    # that is too far back for every token. The window ends in the last token that the row saw before this call.
    nowhere = torch.full((), -window)
    past = call.mask.sum(1, keepdim=True) - call.new.sum(1, keepdim=True) - window + slots
    past, new = torch.where(past < 0, nowhere, past), torch.where(call.new == 0, nowhere, call.positions)
    positions = torch.cat([past, new], dim=1)

    seen = torch.cat([blocks[:, :1] + slots, window + blocks], dim=1)
    exists = seen <= window + last
    seen = seen.clamp(max=window + last)
    queries, keys = shapes.picked(call.positions, tokens, axis=1), shapes.picked(positions, seen, axis=1)
    distance = queries[..., None] - keys[:, :, None]  # (batch_size, blocks, block, window + block)
    visible = (distance >= 0) & (distance < window) & exists[:, None]
    bias = torch.where(visible, torch.zeros((), dtype=call.dtype), torch.full((), ops.MASKED, dtype=call.dtype))
    return SlidingCall(
        rotation=rotation(call, rotary),
        tokens=tokens,
        seen=seen,
        bias=bias[:, None].repeat(1, 1, 1, config.num_attention_heads // kv_heads, 1),
        columns=columns,
        kept=(call.end + slots)[:, None, :, None].expand(-1, kv_heads, -1, -1),
    )


def masked_attention_call(call: Call, rotary: Rotary | None, window: int) -> AttentionCall:
    """Compute what all layers of sliding attention share, for caches that keep all columns.

    Such a layer is full attention whose bias also hides the columns outside the window. So it costs as much time and
    memory as full attention.
    """
    full = attention_call(call, rotary)
    distance = call.positions[:, :, None] - (call.mask.cumsum(1) - 1)[:, None, :]
    hidden = torch.full((), ops.MASKED, dtype=call.dtype)
    return replace(full, bias=torch.where((distance < window)[:, None], full.bias, hidden))
