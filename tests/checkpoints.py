"""The table of tiny checkpoints that the tests share, and the gold: transformers alone, one unpadded row at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedModel


CONV, ATTENTION = "conv", "full_attention"
HYBRID = [CONV, CONV, ATTENTION, CONV, ATTENTION]

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": HYBRID,
    "block_multiple_of": 8,
    "max_position_embeddings": 512,
    "eos_token_id": 7,
}

# What each differs in from BASE. One knob of Lfm2Config at a time, with values that a mistake would not survive.
CHECKPOINTS: dict[str, dict] = {
    "hybrid": {},
    "conv_width_2": {"conv_L_cache": 2},
    "conv_width_4": {"conv_L_cache": 4},
    "conv_width_7": {"conv_L_cache": 7},
    "conv_bias": {"conv_bias": True},
    "untied": {"tie_word_embeddings": False},
    "full_attn_idxs": {"layer_types": None, "full_attn_idxs": [1, 3]},
    "attention_first": {"layer_types": [ATTENTION, CONV, CONV, ATTENTION, CONV]},
    "all_attention": {"layer_types": [ATTENTION] * 5},
    "all_conv": {"layer_types": [CONV] * 5},
    "multi_query": {"num_key_value_heads": 1},
    "multi_head": {"num_key_value_heads": 4},
    "three_heads": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48},
    "odd_head_dim": {"hidden_size": 48},
    "own_head_dim": {"head_dim": 24},
    "plain_feed_forward": {"block_auto_adjust_ff_dim": False},
    "feed_forward_multiplier": {"block_ffn_dim_multiplier": 1.3, "block_multiple_of": 12},
    "rope_theta": {"rope_theta": 500.0},
    "norm_eps": {"norm_eps": 0.1},
}


def make_checkpoint(name: str, folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """Save a checkpoint of the table, with weights whose greedy text varies, under `folder`."""
    config = Lfm2Config(**{**BASE, **CHECKPOINTS[name]})
    torch.manual_seed(seed)
    model = Lfm2ForCausalLM(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "embed" in parameter_name or "lm_head" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 / parameter[0].numel() ** 0.5)
        elif "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    path = folder / name
    model.to(dtype).save_pretrained(path)
    return path


def prompts(lengths: list[int], vocab_size: int = 256, seed: int = 1) -> list[torch.Tensor]:
    """Random token ids of the given lengths, without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, vocab_size, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def gold_tokens(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    """Greedy continuation by transformers, alone and without a cache, so that no cache can be wrong."""
    ids = prompt[None]
    for _ in range(new_tokens):
        logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    tokens = ids[0, len(prompt) :].tolist()
    assert len(set(tokens)) > new_tokens // 3, "a gold that repeats itself proves nothing"
    return tokens
