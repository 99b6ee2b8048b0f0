"""A checkpoint of the exact shape of LFM2-350M with seeded random weights: speed does not depend on values."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import Lfm2Config, Lfm2ForCausalLM


CONV, ATTENTION = "conv", "full_attention"
TOKENIZER = Path(__file__).parent.parent / "demo" / "checkpoint"


def make_350m(path: Path) -> Path:
    """Save it under `path` in bfloat16: 709 MB."""
    config = Lfm2Config(
        vocab_size=65536,
        hidden_size=1024,
        intermediate_size=6656,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        layer_types=[ATTENTION if i in (2, 5, 8, 10, 12, 14) else CONV for i in range(16)],
        block_multiple_of=256,
        eos_token_id=7,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        Lfm2ForCausalLM(config).save_pretrained(path)
    finally:
        torch.set_default_dtype(torch.float32)
    return path


def add_tokenizer(path: Path) -> Path:
    """The demo's tokenizer, which knows the first ids only: onnxruntime-genai does not load a folder without one."""
    for file in TOKENIZER.glob("*token*"):
        shutil.copy(file, path)
    return path
