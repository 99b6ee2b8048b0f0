"""The Mamba-2 mixer: a short convolution, then a recurrence whose state decays by what each token says.

The reference is transformers' `GraniteMoeHybridMambaLayer`.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph.call import ConvCall
from optimum_lfm2.graph.member import Mixed, Weight
from optimum_lfm2.graph.recurrence import GATED, cast, linear_attention, silu_conv, softplus


def inner_width(config: PretrainedConfig) -> int:
    """Return the width of all heads of a mixer."""
    return config.mamba_n_heads * config.mamba_d_head


def group_width(config: PretrainedConfig) -> int:
    """Return the width of the keys of all groups, which is that of their queries too."""
    return config.mamba_n_groups * config.mamba_d_state


def conv_width(config: PretrainedConfig) -> int:
    """Return the width of what the convolution mixes: values, keys and queries."""
    return inner_width(config) + 2 * group_width(config)


def mamba(
    hidden: torch.Tensor,
    past: tuple[torch.Tensor, ...] | None,
    shared: ConvCall,
    weight: Weight,
    name: str,
    config: PretrainedConfig,
) -> Mixed:
    """The Mamba-2 mixer. Arguments and results are those of `graph.member.Mixer`.

    Its caches are the conv state, (batch_size, conv_width, mamba_d_conv), and the recurrent state, float32 (batch_size,
    mamba_n_heads, mamba_d_state, mamba_d_head). A hidden token enters neither: its columns are zero, its step is 0, and
    so are its decay and its value.
    """
    heads, inner, keys = config.mamba_n_heads, inner_width(config), group_width(config)
    state, recurrent = (None, None) if past is None else past

    def bias(part: str) -> torch.Tensor | None:
        return weight(f"{name}.{part}.bias") if config.mamba_proj_bias else None

    projected = ops.linear(hidden, weight(f"{name}.in_proj.weight"), bias("in_proj"))
    gate, mixed, step = shapes.parts(projected, inner, conv_width(config), heads)
    kernel_bias = weight(f"{name}.conv1d.bias") if config.mamba_conv_bias else None
    mixed, present = silu_conv(mixed, state, shared, weight(f"{name}.conv1d.weight", kernel=True), kernel_bias)
    values, key, query = (cast(x, torch.float32) for x in shapes.parts(mixed, inner, keys, keys))

    step = softplus(cast(step, torch.float32) + cast(weight(f"{name}.dt_bias"), torch.float32))
    step = torch.where(shared.visible, step, torch.zeros(()))
    decay = step * -cast(weight(f"{name}.A_log"), torch.float32).exp()
    by_head = shapes.resized(values, (0, 0, heads, config.mamba_d_head))
    stepped = by_head * shapes.resized(step, (0, 0, heads, 1))
    out, recurrent = linear_attention(
        query,
        key,
        shapes.resized(stepped, (0, 0, inner)),
        recurrent,
        decay,
        None,
        config.mamba_n_groups,
        heads,
        GATED,
        1.0,
    )
    skip = by_head * shapes.resized(cast(weight(f"{name}.D"), torch.float32), (heads, 1))
    out = out + shapes.resized(skip, (0, 0, inner))
    out = out * ops.silu(cast(gate, torch.float32))
    normed = grouped_norm(out, cast(weight(f"{name}.norm.weight"), torch.float32), config)
    out = ops.linear(cast(normed, hidden.dtype), weight(f"{name}.out_proj.weight"), bias("out_proj"))
    return out, (present, recurrent), ()


def grouped_norm(x: torch.Tensor, weight: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Norm each group of heads by itself: float32 (batch_size, sequence_length, width), (width) → the same."""
    groups, width = config.mamba_n_groups, inner_width(config)
    if groups == 1:
        return ops.rms_norm(x, weight, config.rms_norm_eps)
    by_group = shapes.resized(x, (0, 0, groups, width // groups))
    normed = ops.rms_norm(by_group, torch.ones(width // groups), config.rms_norm_eps)
    return shapes.resized(normed, (0, 0, width)) * weight
