"""The mixers with a recurrent state as torch code, against transformers' modules on one unpadded row."""

from __future__ import annotations

import pytest
import torch
import transformers

from optimum_lfm2.graph.call import conv_call, read_call
from optimum_lfm2.graph.delta import delta_net
from optimum_lfm2.graph.mamba import mamba


LENGTH, HIDDEN = 21, 32
MAMBA = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "layer_types": ["mamba"],
    "num_attention_heads": 4,
    "num_local_experts": 0,
    "mamba_n_heads": 8,
    "mamba_d_state": 6,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
    "vocab_size": 32,
}
DELTA = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "vocab_size": 32,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CASES = {
    "mamba": {},
    "mamba, biases": {"mamba_proj_bias": True},
    "mamba, no bias of the kernel": {"mamba_conv_bias": False},
    "mamba, kernel of 3": {"mamba_d_conv": 3},
    "mamba, epsilon": {"rms_norm_eps": 0.1},
    "mamba, groups": {"mamba_n_groups": 2},
    "delta": {},
    "delta, eigenvalues from 0 on": {"linear_allow_neg_eigval": False},
    "delta, kernel of 2": {"linear_conv_kernel_dim": 2},
    "delta, heads in groups": {"linear_num_key_heads": 2},
}


def made(case: str):
    """Return transformers' module, and our mixer with the weights of the module, a configuration and a kernel."""
    torch.manual_seed(1)
    if case.startswith("mamba"):
        if "groups" in case and transformers.__version__ < "5":
            pytest.skip("transformers 4 norms all groups together")
        config = transformers.GraniteMoeHybridConfig(**{**MAMBA, **CASES[case]})
        module = transformers.GraniteMoeHybridModel(config).eval().layers[0].mamba
        mixer, kernel = mamba, config.mamba_d_conv
    else:
        if not hasattr(transformers, "OlmoHybridConfig"):
            pytest.skip(f"transformers {transformers.__version__} has no Olmo-Hybrid")
        config = transformers.OlmoHybridConfig(**{**DELTA, **CASES[case]})
        module = transformers.OlmoHybridModel(config).eval().layers[0].linear_attn
        mixer, kernel = delta_net, config.linear_conv_kernel_dim
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1 / parameter[0].numel() ** 0.5)
        else:
            torch.nn.init.normal_(parameter, std=0.5)
    parameters = dict(module.named_parameters())

    def weight(*names: str, kernel: bool = False) -> torch.Tensor:
        joined = torch.cat([parameters[name.removeprefix("mixer.")] for name in names])
        return joined[:, 0].T if kernel else joined

    def own(hidden: torch.Tensor, mask: torch.Tensor, past=None):
        call = conv_call(read_call(hidden, mask, torch.float32), kernel)
        return mixer(hidden, past, call, weight, "mixer", config)

    return module, own


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_mixer_computes_what_transformers_computes(case):
    module, own = made(case)
    hidden = torch.randn(1, LENGTH, HIDDEN)
    expected = module(hidden)
    out, _, _ = own(hidden, torch.ones(1, LENGTH, dtype=torch.int64))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["mamba", "mamba, groups", "delta", "delta, heads in groups"])
@torch.no_grad()
def test_a_rows_hidden_tokens_and_its_chunks_change_nothing(case):
    """A row with padding on both sides, and in chunks of which one is padding alone, gets what it gets alone."""
    module, own = made(case)
    hidden = torch.randn(1, LENGTH, HIDDEN)
    expected = module(hidden)
    padding = torch.full((1, 3, HIDDEN), 50.0)
    padded = torch.cat([padding, hidden, padding], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * LENGTH + [0] * 3])
    whole, state, _ = own(padded, mask)
    torch.testing.assert_close(whole[:, 3:-3], expected, rtol=1e-4, atol=1e-5)
    # The padding on the left is in the first chunk. What ends up in the states is the row's.
    parts, past = [], None
    for start, end in ((0, 9), (9, 10), (10, 24), (24, 27)):
        out, past, _ = own(padded[:, start:end], mask[:, :end], past)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, 3:-3], expected, rtol=1e-4, atol=1e-5)
    for chunked, at_once in zip(past, state, strict=True):
        torch.testing.assert_close(chunked, at_once, rtol=1e-4, atol=1e-5)
