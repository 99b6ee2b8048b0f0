"""The blocks of a layer, in the order of the data: what mixes tokens, then the feed-forward.

They are written for the exporter: each call of `ops.py` or `shapes.py` becomes a node. The reference is transformers'
`modeling_lfm2.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PretrainedConfig

from optimum_lfm2.caches import head_dim
from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph.call import ConvCall, Rotation
from optimum_lfm2.graph.member import Mixed, Weight


def short_conv(
    hidden: torch.Tensor,
    past: tuple[torch.Tensor, ...] | None,
    shared: ConvCall,
    weight: Weight,
    name: str,
    config: PretrainedConfig,
) -> Mixed:
    """The gated short convolution, channel last: windows of columns, multiplied and summed.

    Its cache is the conv state (batch_size, hidden_size, conv_L_cache): the last columns of `B * x`. The new state ends
    at the row's last unmasked token. So right padding does not flush it, and a chunk of padding alone leaves it as it
    was.
    """
    width, taps = config.hidden_size, config.conv_L_cache
    bias = (lambda part: weight(f"{name}.{part}.bias")) if config.conv_bias else (lambda part: None)

    gates = ops.linear(hidden, weight(f"{name}.in_proj.weight"), bias("in_proj"))
    input_gate, output_gate, x = shapes.parts(gates, width, width, width)
    gated = torch.where(shared.visible, input_gate * x, torch.zeros((), dtype=hidden.dtype))
    if past is None:
        columns = shapes.pad(gated, axis=1, before=taps)
    else:
        columns = torch.cat([past[0].transpose(1, 2), gated], dim=1)

    mixed = (shapes.picked(columns, shared.windows, axis=1) * weight(f"{name}.conv.weight", kernel=True)).sum(2)
    if config.conv_bias:
        mixed = mixed + weight(f"{name}.conv.bias")

    out = ops.linear(output_gate * mixed, weight(f"{name}.out_proj.weight"), bias("out_proj"))
    return out, (shapes.columns_at(columns, shared.kept),), (gated.transpose(1, 2),)


@dataclass(frozen=True)
class AttentionParts:
    """The parts of an attention module of transformers, and their names.

    Attributes:
        norm: the name of the norms of query and key, after `q_` and `k_`; None where there are none.
        whole: whether such a norm is over all heads at once. Else it is over each head.
        epsilon: what these norms add to the mean square; None for `norm_eps` of the configuration.
        scale: the factor of the scores; None for `head_dim ** -0.5`.
        out: the name of the output projection.
        bias: whether the projections have biases.
        gate: the name of the projection that gives each head its gate; None where there is none.
    """

    norm: str | None = "layernorm"
    whole: bool = False
    epsilon: float | None = None
    scale: float | None = None
    out: str = "out_proj"
    bias: bool = False
    gate: str | None = None


LFM2_PARTS = AttentionParts()


class Attends(Protocol):
    """What all attention layers of a call share: the angles of tokens, and which columns a token sees."""

    @property
    def rotation(self) -> Rotation | None: ...

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past: tuple[torch.Tensor, ...] | None,
        config: PretrainedConfig,
        scale: float | None = None,
    ) -> Mixed: ...


def attention(
    hidden: torch.Tensor,
    past: tuple[torch.Tensor, ...] | None,
    shared: Attends,
    weight: Weight,
    name: str,
    config: PretrainedConfig,
    parts: AttentionParts = LFM2_PARTS,
) -> Mixed:
    """Grouped-query attention, with norms of query and key before RoPE where there are any.

    One product computes query, key and value. The caches are keys and values, (batch_size, kv_heads, columns,
    head_dim) each. `shared` decides which columns a token sees, and which columns are kept.
    """
    dim, heads, kv_heads = head_dim(config), config.num_attention_heads, config.num_key_value_heads

    def project(x: torch.Tensor, *projections: str) -> torch.Tensor:
        bias = weight(*(f"{name}.{part}.bias" for part in projections)) if parts.bias else None
        return ops.linear(x, weight(*(f"{name}.{part}.weight" for part in projections)), bias)

    def normed(x: torch.Tensor, part: str, count: int) -> torch.Tensor:
        if parts.norm is None:
            return x
        by_head = x if parts.whole else shapes.resized(x, (0, 0, count, dim))
        epsilon = config.norm_eps if parts.epsilon is None else parts.epsilon
        result = ops.rms_norm(by_head, weight(f"{name}.{part}_{parts.norm}.weight"), epsilon)
        return result if parts.whole else shapes.resized(result, (0, 0, count * dim))

    def rotated(x: torch.Tensor, part: str, count: int) -> torch.Tensor:
        x = normed(x, part, count)
        return x if shared.rotation is None else shared.rotation.rotate(x, count)

    widths = (heads * dim, kv_heads * dim, kv_heads * dim)
    query, key, value = shapes.parts(project(hidden, "q_proj", "k_proj", "v_proj"), *widths)
    query, key = rotated(query, "q", heads), rotated(key, "k", kv_heads)
    context, present, columns = shared.attend(query, key, value, past, config, parts.scale)
    if parts.gate:
        context = gated_heads(context, ops.linear(hidden, weight(f"{name}.{parts.gate}.weight")), config)
    return project(context, parts.out), present, columns


def gated_heads(context: torch.Tensor, gate: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Scale each head by the sigmoid of its gate.

    Args:
        context: (batch_size, sequence_length, heads * head_dim). The result has the same shape.
        gate: (batch_size, sequence_length, heads).
    """
    heads, dim = config.num_attention_heads, head_dim(config)
    scaled = shapes.resized(context, (0, 0, heads, dim)) * shapes.resized(gate.sigmoid(), (0, 0, heads, 1))
    return shapes.resized(scaled, (0, 0, heads * dim))


def feed_forward(
    hidden: torch.Tensor, weight: Weight, name: str, parts: tuple[str, str, str] = ("w1", "w3", "w2")
) -> torch.Tensor:
    """SwiGLU: (batch_size, sequence_length, hidden_size) → the same.

    Args:
        hidden: the hidden states.
        weight: gives a parameter by its name.
        name: the name of the feed-forward's module.
        parts: the names of its projections: of the gate, of what it gates, and of the output.
    """
    gate, up, down = (f"{name}.{part}.weight" for part in parts)
    gated = ops.silu(ops.linear(hidden, weight(gate)))
    return ops.linear(gated * ops.linear(hidden, weight(up)), weight(down))
