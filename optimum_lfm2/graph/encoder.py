"""An encoder as an ONNX graph: attention and convolution that look both ways, and the heads. There are no caches.

The reference is `families/bidirectional.py`, on one row without padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PretrainedConfig

from optimum_lfm2.caches import SEQUENCE
from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph.call import AttentionCall, Call, Rotary, attention_call
from optimum_lfm2.graph.member import Head, Mixed, Weight
from optimum_lfm2.graph.tracing import Node, constant, typed


def both_ways_call(call: Call, config: PretrainedConfig, rotary: Rotary | None) -> AttentionCall:
    """Compute what all attention layers of a call share. A token sees all unmasked tokens of its row."""
    return replace(attention_call(call, rotary), causal=False)


class _Tap(Node):
    @staticmethod
    def forward(ctx, columns, first, taps):
        return columns[:, first : columns.shape[1] - (taps - 1 - first)].contiguous()

    @staticmethod
    @typed(3)
    def symbolic(g, columns, first, taps):
        behind = taps - 1 - first
        end = -behind if behind else torch.iinfo(torch.int64).max
        return g.op("Slice", columns, constant(g, [first]), constant(g, [end]), constant(g, [1]))


class _Taps(Node):
    @staticmethod
    def forward(ctx, kernel, taps):
        return tuple(kernel.split(1))

    @staticmethod
    def symbolic(g, kernel, taps):
        emit = typed(*[2] * taps)(lambda g, kernel: tuple(g.op("Split", kernel, constant(g, [1] * taps), outputs=taps)))
        return emit(g, kernel)


@dataclass(frozen=True)
class CentredCall:
    """What all centred convolutions of a call share.

    Attributes:
        visible: whether a token is unmasked, bool (batch_size, sequence_length, 1).
    """

    visible: torch.Tensor


def centred_call(call: Call, config: PretrainedConfig, rotary: Rotary | None) -> CentredCall:
    """Compute what all centred convolutions of a call share."""
    return CentredCall(call.new[:, :, None].to(torch.bool))


def centred_conv(
    hidden: torch.Tensor,
    past: tuple[torch.Tensor, ...] | None,
    shared: CentredCall,
    weight: Weight,
    name: str,
    config: PretrainedConfig,
) -> Mixed:
    """The gated convolution, channel last: slices of columns, multiplied and summed.

    The kernel of k columns begins k // 2 columns before its token. Beyond a row's ends, and at masked tokens, columns
    are zero.
    """
    width, taps = config.hidden_size, config.conv_L_cache
    bias = (lambda part: weight(f"{name}.{part}.bias")) if config.conv_bias else (lambda part: None)

    gates = ops.linear(hidden, weight(f"{name}.in_proj.weight"), bias("in_proj"))
    input_gate, output_gate, x = shapes.parts(gates, width, width, width)
    gated = torch.where(shared.visible, input_gate * x, torch.zeros((), dtype=hidden.dtype))
    columns = shapes.pad(gated, axis=1, before=taps // 2, after=taps - 1 - taps // 2)
    kernel = _Taps.apply(weight(f"{name}.conv.weight", kernel=True), taps)
    mixed = _Tap.apply(columns, 0, taps) * kernel[0]
    for tap in range(1, taps):
        mixed = mixed + _Tap.apply(columns, tap, taps) * kernel[tap]
    if config.conv_bias:
        mixed = mixed + bias("conv")
    out = ops.linear(output_gate * mixed, weight(f"{name}.out_proj.weight"), bias("out_proj"))
    return out, (), ()


def hidden_states(hidden: torch.Tensor, call: Call, weight: Weight, config: PretrainedConfig) -> torch.Tensor:
    """Return the hidden states, (batch_size, sequence_length, hidden_size), for an encoder without a head."""
    return shapes.named(hidden)


def on_every_token(
    hidden: torch.Tensor, call: Call, weight: Weight, config: PretrainedConfig, name: str, bias: bool
) -> torch.Tensor:
    """Apply a linear head to every token: (batch_size, sequence_length, hidden_size) → (…, out)."""
    return ops.linear(hidden, weight(f"{name}.weight"), weight(f"{name}.bias") if bias else None)


def on_first_token(
    hidden: torch.Tensor, call: Call, weight: Weight, config: PretrainedConfig, name: str
) -> torch.Tensor:
    """Apply a linear head to each row's first unmasked token.

    (batch_size, sequence_length, hidden_size) → (batch_size, out).
    """
    first = call.mask.argmax(1, keepdim=True)[:, :, None]
    states = shapes.resized(shapes.columns_at(hidden, first), (0, config.hidden_size))
    return ops.linear(states, weight(f"{name}.weight"), weight(f"{name}.bias"))


CLASSIFIER = "classifier"
HEADS = {
    "feature-extraction": Head("last_hidden_state", lambda config: (SEQUENCE, config.hidden_size), hidden_states),
    "fill-mask": Head(
        "logits",
        lambda config: (SEQUENCE, config.vocab_size),
        partial(on_every_token, name="lm_head", bias=False),
    ),
    "token-classification": Head(
        "logits",
        lambda config: (SEQUENCE, config.num_labels),
        partial(on_every_token, name=CLASSIFIER, bias=True),
    ),
    "text-classification": Head(
        "logits", lambda config: (config.num_labels,), partial(on_first_token, name=CLASSIFIER)
    ),
}
