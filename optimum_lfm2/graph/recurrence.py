"""What Mamba-2 and the gated delta rule share: the recurrence of linear attention, and the convolution before it.

`com.microsoft.LinearAttention` has a kernel for float32 alone (onnxruntime 1.25.1 to 1.32, CPU). So both mixers compute
the recurrence in float32, and its state is float32 in every file: in half precision, small updates of a state that
decays slowly would be lost.
"""

from __future__ import annotations

import torch

from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph.call import ConvCall
from optimum_lfm2.graph.ops import ONNX_TYPE
from optimum_lfm2.graph.tracing import Node, none, typed


MIN_ONNXRUNTIME = "1.25.1"  # has the operator
GATED, GATED_DELTA = "gated", "gated_delta"


class _LinearAttention(Node):
    @staticmethod
    def forward(ctx, query, key, value, past, decay, beta, heads, kv_heads, rule, scale):
        batch, length, _ = value.shape
        query, key, value = (
            x.reshape(batch, length, count, -1)
            for x, count in ((query, heads), (key, heads), (value, kv_heads))  # the keys are those of the queries
        )
        query, key = (x.repeat_interleave(kv_heads // heads, dim=2) for x in (query, key))
        state = value.new_zeros(batch, kv_heads, key.shape[3], value.shape[3]) if past is None else past
        outputs = []
        for t in range(length):
            state = state * decay[:, t].exp()[:, :, None, None]
            new = value[:, t]
            if rule == GATED_DELTA:
                new = beta[:, t, :, None] * (new - (key[:, t, :, None] @ state)[:, :, 0])
            state = state + key[:, t, :, :, None] * new[:, :, None]
            outputs.append(scale * (query[:, t, :, None] @ state)[:, :, 0])
        return torch.stack(outputs, dim=1).flatten(2), state

    @staticmethod
    @typed(3, 4)
    def symbolic(g, query, key, value, past, decay, beta, heads, kv_heads, rule, scale):
        return tuple(
            g.op(
                "com.microsoft::LinearAttention",
                query,
                key,
                value,
                none(g) if past is None else past,
                decay,
                *(() if beta is None else (beta,)),
                q_num_heads_i=heads,
                kv_num_heads_i=kv_heads,
                update_rule_s=rule,
                scale_f=scale,
                outputs=2,
            )
        )


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: torch.Tensor | None,
    decay: torch.Tensor,
    beta: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    rule: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over the tokens of a call. All tensors are float32.

    A token with decay 0 leaves the state as it was if its value is 0 (`GATED`) or its beta is 0 (`GATED_DELTA`),
    whatever its query and key are.

    Args:
        query, key: (batch_size, sequence_length, heads * key_dim). The heads of values share them in groups.
        value: (batch_size, sequence_length, kv_heads * value_dim).
        past: the state, (batch_size, kv_heads, key_dim, value_dim). None is a state of zeros.
        decay: the logarithm of what the state is multiplied by, (batch_size, sequence_length, kv_heads).
        beta: the rate of the delta rule, of the shape of `decay`. None for `GATED`.
        heads: the number of heads of queries and keys.
        kv_heads: the number of heads of values, a multiple of `heads`.
        rule: `GATED` adds the outer product of key and value to the decayed state. `GATED_DELTA` adds that of the key
            and of beta times what the value differs from the decayed state's own value at the key.
        scale: the factor of the outputs.

    Returns:
        The outputs (batch_size, sequence_length, kv_heads * value_dim), and the state after the last token.
    """
    return _LinearAttention.apply(query, key, value, past, decay, beta, heads, kv_heads, rule, scale)


class _Softplus(Node):
    @staticmethod
    def forward(ctx, x):
        return torch.nn.functional.softplus(x)

    @staticmethod
    @typed(None)
    def symbolic(g, x):
        return g.op("Softplus", x)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """Return `log(1 + exp(x))`, of the shape of `x`."""
    return _Softplus.apply(x)


class _Cast(Node):
    @staticmethod
    def forward(ctx, x, dtype):
        return x.to(dtype)

    @staticmethod
    @typed(None, like=1)
    def symbolic(g, x, dtype):
        return g.op("Cast", x, to_i=ONNX_TYPE[dtype])


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `x` as `dtype`. It is no node where it has this dtype already."""
    return x if x.dtype == dtype else _Cast.apply(x, dtype)


def silu_conv(
    x: torch.Tensor, past: torch.Tensor | None, shared: ConvCall, kernel: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A causal convolution of each channel, then SiLU. Hidden tokens are zeros.

    Args:
        x: (batch_size, sequence_length, width).
        past: the conv state, (batch_size, width, taps); None for one of zeros.
        shared: what all convolutions of the call share.
        kernel: (taps, width).
        bias: (width), or None.

    Returns:
        The result, of the shape of `x`, and the next state, which ends at the row's last unmasked token.
    """
    shown = torch.where(shared.visible, x, torch.zeros((), dtype=x.dtype))
    if past is None:
        columns = shapes.pad(shown, axis=1, before=shared.taps)
    else:
        columns = torch.cat([past.transpose(1, 2), shown], dim=1)
    mixed = (shapes.picked(columns, shared.windows, axis=1) * kernel).sum(2)
    if bias is not None:
        mixed = mixed + bias
    return ops.silu(mixed), shapes.columns_at(columns, shared.kept)
