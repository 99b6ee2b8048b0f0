"""Sliding attention: a token sees the last `sliding_window` tokens of its row, itself among them.

The cache is a window of fixed width, as a conv state is: the keys and values of the row's own last tokens, whatever
padding lies between them. So a layer costs the same after any number of tokens. Which columns of the window hold a
token follows from the mask alone: where the row has seen fewer than the window takes, the first columns hold none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from optimum_lfm2.caches import head_dim
from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph.call import Call, Rotary, Rotation, rotation


@dataclass(frozen=True)
class SlidingCall:
    """What layers of sliding attention share.

    The columns are those of the window, then the new tokens.

    Attributes:
        rotation: the angles of the new tokens.
        bias: (batch_size, 1, groups * sequence_length, window + sequence_length), 0 on visible columns and
            `ops.MASKED` on others. A group is one of the query heads that share a head of keys.
        kept: int64 (batch_size, kv_heads, window, 1), the columns that become the next window.
    """

    rotation: Rotation
    bias: torch.Tensor
    kept: torch.Tensor

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past: tuple[torch.Tensor, ...] | None,
        config: PretrainedConfig,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Attention over the window and the new tokens.

        Returns the context, (tokens, heads * head_dim), the next window, and the new keys and values, each (batch_size,
        kv_heads, sequence_length, head_dim).

        Standard operators: `GroupQueryAttention` refuses several rows with several new tokens on a cache that is not
        empty (onnxruntime 1.32, CPU), and this cache never is.

        Args:
            query, key: rotated rows.
            value: rows.
            past: keys and values, (batch_size, kv_heads, window, head_dim) each, or None for an empty window.
        """
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, head_dim(config)

        def by_head(rows: torch.Tensor, count: int) -> torch.Tensor:
            return shapes.resized(rows, (0, 0, count, dim)).transpose(1, 2)

        new = by_head(key, kv_heads), by_head(value, kv_heads)
        if past is None:
            keys, values = (shapes.pad(x, axis=2, before=config.sliding_window) for x in new)
        else:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))
        grouped = shapes.resized(by_head(query, heads), (0, kv_heads, -1, dim))
        scores = grouped @ keys.transpose(2, 3) * dim**-0.5 + self.bias
        context = shapes.resized(scores.softmax(-1) @ values, (0, heads, -1, dim)).transpose(1, 2)
        window = shapes.gathered(keys, self.kept), shapes.gathered(values, self.kept)
        return shapes.flat(context, heads * dim), window, new


def sliding_call(call: Call, rotary: Rotary, config: PretrainedConfig) -> SlidingCall:
    """What layers of sliding attention share."""
    window, kv_heads = config.sliding_window, config.num_key_value_heads
    slots = torch.arange(window)
    seen = call.mask.sum(1, keepdim=True) - call.new.sum(1, keepdim=True)
    nowhere = torch.full((), -window)  # as a key's position: too far back for every token

    past = seen - window + slots  # the token at the end of the window is the last that the row has seen
    positions = torch.cat(
        [torch.where(past < 0, nowhere, past), torch.where(call.new == 0, nowhere, call.positions)], dim=1
    )
    distance = call.positions[:, :, None] - positions[:, None, :]
    visible = (distance >= 0) & (distance < window)
    bias = torch.where(visible, torch.zeros((), dtype=call.dtype), torch.full((), ops.MASKED, dtype=call.dtype))
    return SlidingCall(
        rotation=rotation(call, rotary),
        bias=bias[:, None].repeat(1, 1, config.num_attention_heads // kv_heads, 1),
        kept=(call.end + slots)[:, None, :, None].expand(-1, kv_heads, -1, -1),
    )
