"""The operator of linear attention: its meaning in torch is what onnxruntime computes; hidden tokens change nothing."""

from __future__ import annotations

import io
import warnings

import onnxruntime
import pytest
import torch

from optimum_lfm2.graph.recurrence import GATED, GATED_DELTA, linear_attention


BATCH, LENGTH, KEY, VALUE = 2, 6, 8, 12
NAMES = ("query", "key", "value", "past", "decay", "beta")
# The heads of queries and of values, the rule and the scale.
CASES = [(1, 4, GATED, 1.0), (2, 4, GATED, 0.5), (4, 4, GATED_DELTA, 0.25), (2, 4, GATED_DELTA, 1.0)]


class Recurrence(torch.nn.Module):
    def __init__(self, *settings) -> None:
        super().__init__()
        self._settings = settings

    def forward(self, *tensors):
        return linear_attention(*tensors, *self._settings)


def tensors(heads: int, kv_heads: int, rule: str, seed: int = 0) -> list[torch.Tensor]:
    """Return random inputs in the order of `NAMES`. Keys have the length 1, without which the delta rule diverges."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    unit = torch.nn.functional.normalize(normal(LENGTH, heads, KEY), dim=-1)
    query, value, past = normal(LENGTH, heads * KEY), normal(LENGTH, kv_heads * VALUE), normal(kv_heads, KEY, VALUE)
    decay, beta = -normal(LENGTH, kv_heads).abs(), normal(LENGTH, kv_heads).sigmoid() * 2
    return [query, unit.flatten(2), value, past, decay, *([beta] if rule == GATED_DELTA else [None])]


def session(settings, inputs) -> onnxruntime.InferenceSession:
    file = io.BytesIO()
    named = [name for name, x in zip(NAMES, inputs, strict=True) if x is not None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Recurrence(*settings),
            tuple(inputs),
            file,
            input_names=named,
            output_names=["out", "present"],
            opset_version=18,
            dynamo=False,
            custom_opsets={"com.microsoft": 1},
        )
    return onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("settings", CASES)
def test_the_meaning_in_torch_is_what_onnxruntime_computes(settings):
    inputs = tensors(*settings[:3])
    expected = linear_attention(*inputs, *settings)
    feeds = {name: x.numpy() for name, x in zip(NAMES, inputs, strict=True) if x is not None}
    for own, exact in zip(session(settings, inputs).run(None, feeds), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(own), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", CASES)
def test_onnxruntime_leaves_the_state_at_hidden_tokens_exactly_as_it_was(settings):
    """The mixers hide a token by decay 0 and value 0 (gated) or beta 0 (delta rule). Junk in queries and keys stays."""
    inputs = tensors(*settings[:3])
    hidden = [0, 1, 3, 5]
    shown = [t for t in range(LENGTH) if t not in hidden]
    query, key, value, past, decay, beta = (None if x is None else x.clone() for x in inputs)
    query[:, hidden], key[:, hidden], decay[:, hidden] = 1e4, -1e4, 0
    if beta is None:
        value[:, hidden] = 0
    else:
        beta[:, hidden] = 0
    run = session(settings, inputs)

    def result(*given):
        return run.run(None, {name: x.numpy() for name, x in zip(NAMES, given, strict=True) if x is not None})

    padded = result(query, key, value, past, decay, beta)
    # The session takes rows of any length, since its shapes are not declared.
    alone = [x if x is None or x.dim() == 4 else x[:, shown].contiguous() for x in inputs]
    out, state = linear_attention(*alone, *settings)
    torch.testing.assert_close(torch.from_numpy(padded[0])[:, shown], out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(padded[1]), state, rtol=1e-5, atol=1e-5)
    everything = [query, key, value, past, torch.zeros_like(decay), None if beta is None else torch.zeros_like(beta)]
    if beta is None:
        everything[2] = torch.zeros_like(value)
    assert (result(*everything)[1] == past.numpy()).all()
