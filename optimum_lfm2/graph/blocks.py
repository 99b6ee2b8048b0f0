"""The blocks of a layer, in the order in which the data flows: what mixes tokens, then the feed-forward.

They are written for the exporter: the calls of `ops.py` and `shapes.py` are the graph's nodes. What they must equal is
transformers' `modeling_lfm2.py`.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from optimum_lfm2.caches import head_dim
from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph.call import AttentionCall, ConvCall
from optimum_lfm2.graph.member import Weight


def short_conv(
    hidden: torch.Tensor,
    past: tuple[torch.Tensor, ...] | None,
    shared: ConvCall,
    weight: Weight,
    name: str,
    config: PretrainedConfig,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The gated short convolution, channel last: windows of columns, multiplied and summed.

    Its cache is the conv state (batch_size, hidden_size, conv_L_cache): the last columns of `B * x`. The new state ends
    at the row's last unmasked token. So right padding does not flush it, and a chunk of padding alone leaves it as it
    was.
    """
    width, taps = config.hidden_size, config.conv_L_cache
    bias = (lambda part: weight(f"{name}.{part}.bias")) if config.conv_bias else (lambda part: None)

    gates = ops.linear(hidden, weight(f"{name}.in_proj.weight"), bias("in_proj"))
    input_gate, output_gate, x = shapes.split_in_three(gates, width)
    gated = torch.where(shared.visible, input_gate * x, torch.zeros((), dtype=hidden.dtype))
    gated = shapes.rows(gated, shared.shape)
    if past is None:
        columns = shapes.pad(gated, axis=1, before=taps)
    else:
        columns = torch.cat([past[0].transpose(1, 2), gated], dim=1)

    mixed = (shapes.windows(columns, shared.windows) * weight(f"{name}.conv.weight", kernel=True)).sum(2)
    if config.conv_bias:
        mixed = mixed + bias("conv")

    out = ops.linear(output_gate * shapes.flat(mixed, width), weight(f"{name}.out_proj.weight"), bias("out_proj"))
    return out, (shapes.columns_at(columns, shared.end, taps),)


def attention(
    hidden: torch.Tensor,
    past: tuple[torch.Tensor, ...] | None,
    shared: AttentionCall,
    weight: Weight,
    name: str,
    config: PretrainedConfig,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Grouped-query attention, with a norm of each head of query and key before RoPE.

    Its caches are keys and values, (batch_size, kv_heads, columns, head_dim) each.
    """
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    padding = -dim % ops.HEAD_DIM_MULTIPLE  # zeros that nobody outside sees

    def project(part: str) -> torch.Tensor:
        return ops.linear(hidden, weight(f"{name}.{part}_proj.weight"))

    def rotated(part: str, count: int) -> torch.Tensor:
        normed = ops.rms_norm(
            shapes.flat(project(part), dim), weight(f"{name}.{part}_layernorm.weight"), config.norm_eps
        )
        return ops.rotary_embedding(shapes.rows(normed, shared.shape), shared.index, shared.cos, shared.sin, count)

    def padded(x: torch.Tensor) -> torch.Tensor:
        return shapes.rows(shapes.pad(shapes.flat(x, dim), axis=1, after=padding), shared.shape) if padding else x

    if padding and past is not None:
        past = tuple(shapes.pad(x, axis=3, after=padding) for x in past)
    context, keys, values = ops.group_query_attention(
        padded(rotated("q", heads)),
        padded(rotated("k", kv_heads)),
        padded(shapes.rows(project("v"), shared.shape)),
        past,
        shared.last,
        shared.total,
        shared.bias,
        heads,
        kv_heads,
        dim**-0.5,
    )
    if padding:
        context, keys, values = (shapes.flat(context, dim + padding)[:, :dim], keys[..., :dim], values[..., :dim])
    return ops.linear(shapes.flat(context, heads * dim), weight(f"{name}.out_proj.weight")), (keys, values)


def feed_forward(hidden: torch.Tensor, weight: Weight, name: str) -> torch.Tensor:
    """SwiGLU."""
    gate = ops.linear(hidden, weight(f"{name}.w1.weight"))
    return ops.linear(ops.silu(gate) * ops.linear(hidden, weight(f"{name}.w3.weight")), weight(f"{name}.w2.weight"))
