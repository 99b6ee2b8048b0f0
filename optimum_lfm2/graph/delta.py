"""The gated delta net: short convolutions of query, key and value, then the gated delta rule.

The reference is transformers' `OlmoHybridGatedDeltaNet`.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph.call import ConvCall
from optimum_lfm2.graph.member import Mixed, Weight
from optimum_lfm2.graph.recurrence import GATED_DELTA, cast, linear_attention, silu_conv, softplus


NORM_EPSILON = 1e-6  # of the norms of query and key, as transformers has it
OUT_EPSILON = 1e-5  # of the norm before the output, which no configuration names


def conv_widths(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return the widths of query, key and value, each of all heads."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    return keys, keys, config.linear_num_value_heads * config.linear_value_head_dim


def delta_net(
    hidden: torch.Tensor,
    past: tuple[torch.Tensor, ...] | None,
    shared: ConvCall,
    weight: Weight,
    name: str,
    config: PretrainedConfig,
    packed: bool = False,
) -> Mixed:
    """The gated delta net. Arguments and results are those of `graph.member.Mixer`.

    Its caches are the conv states of query, key and value, (batch_size, width, linear_conv_kernel_dim) each, and the
    recurrent state, float32 (batch_size, linear_num_value_heads, linear_key_head_dim, linear_value_head_dim). A hidden
    token enters none of them: its columns are zero, and so are its decay and its beta.

    Args:
        packed: whether the three conv states are one, joined along their widths.
    """
    widths = conv_widths(config)
    heads, kv_heads = config.linear_num_key_heads, config.linear_num_value_heads
    states, recurrent = ((), None) if past is None else (past[:-1], past[-1])

    def project(*parts: str) -> torch.Tensor:
        return ops.linear(hidden, weight(*(f"{name}.{part}.weight" for part in parts)))

    projected = project("q_proj", "k_proj", "v_proj", "g_proj")
    mixed, gate = shapes.parts(projected, sum(widths), widths[2])
    state = torch.cat(states, dim=1) if len(states) > 1 else next(iter(states), None)
    mixed, present = silu_conv(mixed, state, shared, weight(f"{name}.conv1d.weight", kernel=True), None)
    query, key, value = (cast(x, torch.float32) for x in shapes.parts(mixed, *widths))

    step, rate = shapes.parts(project("a_proj", "b_proj"), kv_heads, kv_heads)
    step = softplus(cast(step, torch.float32) + cast(weight(f"{name}.dt_bias"), torch.float32))
    decay = step * -cast(weight(f"{name}.A_log"), torch.float32).exp()
    beta = cast(rate, torch.float32).sigmoid() * (2.0 if config.linear_allow_neg_eigval else 1.0)
    decay, beta = (torch.where(shared.visible, x, torch.zeros(())) for x in (decay, beta))
    dim = config.linear_key_head_dim
    out, recurrent = linear_attention(
        unit_heads(query, heads, dim),
        unit_heads(key, heads, dim),
        value,
        recurrent,
        decay,
        beta,
        heads,
        kv_heads,
        GATED_DELTA,
        dim**-0.5,
    )
    by_head = shapes.resized(out, (0, 0, kv_heads, config.linear_value_head_dim))
    normed = ops.rms_norm(by_head, cast(weight(f"{name}.o_norm.weight"), torch.float32), OUT_EPSILON)
    out = shapes.resized(normed, (0, 0, widths[2])) * ops.silu(cast(gate, torch.float32))
    out = ops.linear(cast(out, hidden.dtype), weight(f"{name}.o_proj.weight"))
    # torch's own split, since a node of ours with several outputs must have one that is read, and a graph without cache
    # reads none of these.
    parts = (present,) if packed else present.split(widths, dim=1)
    return out, (*parts, recurrent), ()


def unit_heads(x: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """Scale each head to the length 1: float32 (batch_size, sequence_length, heads * dim) → the same.

    It is a root mean square norm, whose result is longer by a factor that its weight takes back.
    """
    by_head = shapes.resized(x, (0, 0, heads, dim))
    unit = ops.rms_norm(by_head, torch.full((dim,), dim**-0.5), NORM_EPSILON / dim)
    return shapes.resized(unit, (0, 0, heads * dim))
