"""LFM2 as an ONNX graph: masks, the two blocks, the decoder, in the order in which the data flows.

Written for the exporter: the calls of `ops.py` and `shapes.py` are the graph's nodes. What it must equal is
transformers' `modeling_lfm2.py`.
One rule everywhere: only `attention_mask` decides what a row sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from optimum_lfm2.caches import ATTENTION, CONV, head_dim
from optimum_lfm2.graph import ops, shapes


Weight = Callable[..., torch.Tensor]
FeedForward = Callable[[torch.Tensor, Weight, str], torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """What every layer needs to know of this call's rows; computed once in the graph.

    In a model without attention, what only attention reads is None.

    Attributes:
        shape: int64 (3), [batch_size, sequence_length, -1].
        visible: bool (tokens, 1), whether a new token is unmasked.
        index: int64 (batch_size, sequence_length), counts the tokens of the call: where `cos` and `sin` are read.
        cos, sin: (tokens, head_dim / 2).
        last, total: int32 (batch_size) and int32 scalar, for attention.
        bias: (batch_size, 1, sequence_length, total), 0 on visible columns and -1e4 on masked ones.
        end: int64 (batch_size, 1), how many new columns the row has up to its last unmasked token.
        windows: int64 (sequence_length, conv_L_cache), which columns, of state and new tokens, each new token mixes.
    """

    shape: torch.Tensor
    visible: torch.Tensor
    index: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    last: torch.Tensor | None
    total: torch.Tensor | None
    bias: torch.Tensor
    end: torch.Tensor
    windows: torch.Tensor


def read_mask(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
    attends: bool,
    taps: int,
) -> Rows:
    batch, sequence = input_ids.shape
    total = attention_mask.shape[1]
    new = attention_mask[:, total - sequence :]
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, total - sequence :]
    columns = torch.arange(sequence, device=input_ids.device)
    masked = torch.where(attention_mask == 0, torch.full((), ops.MASKED, dtype=dtype), torch.zeros((), dtype=dtype))
    cos = sin = last = length = None
    if attends:  # torch's exporter cannot remove an unused node of several outputs
        cos, sin = ops.rotary_table(positions, inverse_frequencies, scaling, dtype)
        last, length = shapes.lengths(attention_mask)
    return Rows(
        shape=shapes.row_shape(input_ids),
        visible=new.reshape(-1, 1) != 0,
        index=torch.arange(batch * sequence, device=input_ids.device).reshape(batch, sequence),
        cos=cos,
        sin=sin,
        last=last,
        total=length,
        bias=masked[:, None, None, :].expand(-1, 1, sequence, -1),
        end=(new * (columns + 1)).amax(1, keepdim=True),
        windows=columns[:, None] + torch.arange(1, taps + 1),
    )


def short_conv(
    hidden: torch.Tensor, state: torch.Tensor | None, rows: Rows, weight: Weight, name: str, config: PretrainedConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated short convolution, channel last: windows of columns, multiplied and summed.

    Args:
        hidden: (tokens, hidden_size).
        state: the last `conv_L_cache` columns of B * x, (batch_size, hidden_size, conv_L_cache), or None for none.

    Returns:
        The block's output, and the new state: the columns up to the row's last unmasked token, so that right padding
        does not flush it and a chunk of padding alone leaves it as it was.
    """
    width, taps = config.hidden_size, config.conv_L_cache
    bias = (lambda part: weight(f"{name}.{part}.bias")) if config.conv_bias else (lambda part: None)

    gates = ops.linear(hidden, weight(f"{name}.in_proj.weight"), bias("in_proj"))
    input_gate, output_gate, x = shapes.split_in_three(gates, width)
    gated = torch.where(rows.visible, input_gate * x, torch.zeros((), dtype=hidden.dtype))
    gated = shapes.rows(gated, rows.shape)
    empty = state is None
    columns = shapes.pad(gated, axis=1, before=taps) if empty else torch.cat([state.transpose(1, 2), gated], dim=1)

    mixed = (shapes.windows(columns, rows.windows) * weight(f"{name}.conv.weight", kernel=True)).sum(2)
    if config.conv_bias:
        mixed = mixed + bias("conv")

    out = ops.linear(output_gate * shapes.flat(mixed, width), weight(f"{name}.out_proj.weight"), bias("out_proj"))
    return out, shapes.columns_at(columns, rows.end, taps)


def attention(
    hidden: torch.Tensor,
    past: tuple[torch.Tensor, ...] | None,
    rows: Rows,
    weight: Weight,
    name: str,
    config: PretrainedConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Grouped-query attention with per-head norms of query and key before RoPE; returns output, keys, values."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    padding = -dim % ops.HEAD_DIM_MULTIPLE  # zeros that nobody outside sees

    def project(part: str) -> torch.Tensor:
        return ops.linear(hidden, weight(f"{name}.{part}_proj.weight"))

    def rotated(part: str, count: int) -> torch.Tensor:
        normed = ops.rms_norm(
            shapes.flat(project(part), dim), weight(f"{name}.{part}_layernorm.weight"), config.norm_eps
        )
        return ops.rotary_embedding(shapes.rows(normed, rows.shape), rows.index, rows.cos, rows.sin, count)

    def padded(x: torch.Tensor) -> torch.Tensor:
        return shapes.rows(shapes.pad(shapes.flat(x, dim), axis=1, after=padding), rows.shape) if padding else x

    if padding and past is not None:
        past = tuple(shapes.pad(x, axis=3, after=padding) for x in past)
    context, keys, values = ops.group_query_attention(
        padded(rotated("q", heads)),
        padded(rotated("k", kv_heads)),
        padded(shapes.rows(project("v"), rows.shape)),
        past,
        rows.last,
        rows.total,
        rows.bias,
        heads,
        kv_heads,
        dim**-0.5,
    )
    if padding:
        context, keys, values = (shapes.flat(context, dim + padding)[:, :dim], keys[..., :dim], values[..., :dim])
    return ops.linear(shapes.flat(context, heads * dim), weight(f"{name}.out_proj.weight")), keys, values


def feed_forward(hidden: torch.Tensor, weight: Weight, name: str) -> torch.Tensor:
    """SwiGLU."""
    gate = ops.linear(hidden, weight(f"{name}.w1.weight"))
    return ops.linear(ops.silu(gate) * ops.linear(hidden, weight(f"{name}.w3.weight")), weight(f"{name}.w2.weight"))


def decoder(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    past: Sequence[tuple[torch.Tensor, ...]] | None,
    num_logits_to_keep: torch.Tensor | None,
    weight: Weight,
    feed_forwards: Sequence[FeedForward],
    config: PretrainedConfig,
    rotary: tuple[torch.Tensor, float],
    prefix: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    """Embedding, layers, final norm, and the head where `num_logits_to_keep` is given.

    Args:
        past: the caches of `optimum_lfm2.caches.cache_tensors`, one tuple a layer; None for a graph without
            cache inputs.
        weight: gives a parameter by its name in the checkpoint.
        feed_forwards: one a layer.
        rotary: inverse frequencies (head_dim / 2) and attention scaling, from transformers' own module.
        prefix: what the decoder's parameter names begin with: `model.` under a head, else nothing.

    Returns:
        Logits (batch_size, num_logits, vocab_size) or hidden states (batch_size, sequence_length, hidden_size), and the
        present caches, one tuple a layer.
    """
    attends, taps = ATTENTION in config.layer_types, config.conv_L_cache
    rows = read_mask(input_ids, attention_mask, *rotary, dtype, attends, taps)
    width, epsilon, last_layer = config.hidden_size, config.norm_eps, config.num_hidden_layers - 1
    present: list[tuple[torch.Tensor, ...]] = []

    hidden = ops.embedding(weight(f"{prefix}embed_tokens.weight"), input_ids)
    normed = ops.rms_norm(hidden, weight(f"{prefix}layers.0.operator_norm.weight"), epsilon)
    for i, (layer_type, layer_feed_forward) in enumerate(zip(config.layer_types, feed_forwards, strict=True)):
        name = f"{prefix}layers.{i}"
        layer_past = None if past is None else past[i]
        if layer_type == CONV:
            state = None if layer_past is None else layer_past[0]
            out, *caches = short_conv(normed, state, rows, weight, f"{name}.conv", config)
        else:
            out, *caches = attention(normed, layer_past, rows, weight, f"{name}.self_attn", config)
        present.append(tuple(caches))
        if i == last_layer and num_logits_to_keep is not None:
            # Nothing after this point mixes tokens: the rest runs on the tokens whose logits are asked for.
            out, hidden = (
                shapes.flat(shapes.last_tokens(shapes.rows(x, rows.shape), num_logits_to_keep), width)
                for x in (out, hidden)
            )
        normed, hidden = ops.skip_rms_norm(out, hidden, weight(f"{name}.ffn_norm.weight"), epsilon)
        out = layer_feed_forward(normed, weight, f"{name}.feed_forward")
        next_norm = f"{prefix}embedding_norm" if i == last_layer else f"{prefix}layers.{i + 1}.operator_norm"
        normed, hidden = ops.skip_rms_norm(out, hidden, weight(f"{next_norm}.weight"), epsilon)

    if num_logits_to_keep is not None:
        normed = ops.linear(normed, weight("lm_head.weight"))
    return shapes.batched(normed, input_ids), present
