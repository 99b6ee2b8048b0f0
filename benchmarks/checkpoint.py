"""Checkpoints of the shapes of published models, with seeded random weights."""

from __future__ import annotations

import json
import shutil
import string
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Lfm2Config, Lfm2ForCausalLM, PretrainedConfig, PreTrainedModel


CONV, ATTENTION = "conv", "full_attention"
TOKENIZER = Path(__file__).parent.parent / "demo" / "checkpoint"


SHAPES = ("lfm2-350m", "lfm2-8b-a1b", "lfm3-1.7b", "granite-4.0-h-350m")
LAYERS = 24  # of LFM2-8B-A1B


def random_checkpoint(work: Path, shape: str = SHAPES[0], layers: int | None = None) -> Path:
    """Return the folder of a checkpoint of one of `SHAPES`, with a tokenizer. It is made under `work` if missing."""
    experts = shape == "lfm2-8b-a1b"
    path = work / (f"{shape}-{layers or LAYERS}" if experts else shape)
    if not (path / "tokenizer.json").exists():  # this file is written last
        print(f"making {path}", file=sys.stderr, flush=True)
        work.mkdir(parents=True, exist_ok=True)
        spell_out(add_tokenizer(make_8b_a1b(path, layers or LAYERS) if experts else DENSE[shape](path)))
    return path


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
    return save_seeded(path, Lfm2ForCausalLM, config)


def make_1_7b(path: Path) -> Path:
    """Save a checkpoint of LFM3-1.7B's shape under `path` in bfloat16: 3.4 GB."""
    from transformers import Lfm3Config, Lfm3ForCausalLM  # of transformers 5.23

    return save_seeded(path, Lfm3ForCausalLM, Lfm3Config())


def make_granite_350m(path: Path) -> Path:
    """Save a checkpoint of Granite-4.0-H-350M's shape under `path` in bfloat16: 700 MB."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        vocab_size=100352,
        hidden_size=768,
        shared_intermediate_size=2048,
        num_local_experts=0,
        num_hidden_layers=32,
        layer_types=["attention" if i in (10, 13, 17, 27) else "mamba" for i in range(32)],
        num_attention_heads=12,
        num_key_value_heads=4,
        mamba_n_heads=48,
        mamba_d_head=32,
        mamba_d_state=128,
        embedding_multiplier=12.0,
        residual_multiplier=0.246,
        attention_multiplier=0.015625,
        logits_scaling=3.0,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        eos_token_id=7,
    )
    return save_seeded(path, GraniteMoeHybridForCausalLM, config)


DENSE = {"lfm2-350m": make_350m, "lfm3-1.7b": make_1_7b, "granite-4.0-h-350m": make_granite_350m}


def save_seeded(path: Path, model: type[PreTrainedModel], config: PretrainedConfig) -> Path:
    """Save a model as transformers makes it, in bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model(config).save_pretrained(path)
    finally:
        torch.set_default_dtype(torch.float32)
    return path


def make_8b_a1b(path: Path, layers: int = LAYERS) -> Path:
    """Save a checkpoint of LFM2-8B-A1B's shape, or of its first layers, under `path`: 0.7 GB a layer."""
    from transformers import Lfm2MoeConfig  # transformers 4 does not have it

    kinds = [ATTENTION if i in (2, 6, 10, 14, 18, 21) else CONV for i in range(layers)]
    return write_moe(path, Lfm2MoeConfig(num_hidden_layers=layers, layer_types=kinds, eos_token_id=7))


def write_moe(path: Path, config: PretrainedConfig) -> Path:
    """Save random bfloat16 weights for a configuration with experts. Each layer is a file, made and written in turn.

    Each expert has tensors of its own, as on the Hub.
    """
    config.architectures = ["Lfm2MoeForCausalLM"]
    config.save_pretrained(path)
    generator = torch.Generator().manual_seed(0)
    width = config.hidden_size
    table = {"model.embed_tokens.weight": (config.vocab_size, width), "model.embedding_norm.weight": (width,)}
    shards = [table, *(_layer_shapes(config, i) for i in range(config.num_hidden_layers))]
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _random(name, shape, generator) for name, shape in shapes.items()}, path / file)
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def _layer_shapes(config: Any, layer: int) -> dict[str, tuple[int, ...]]:
    width, name = config.hidden_size, f"model.layers.{layer}"
    head = width // config.num_attention_heads
    shapes: dict[str, tuple[int, ...]] = {f"{name}.{norm}.weight": (width,) for norm in ("operator_norm", "ffn_norm")}
    if config.layer_types[layer] == CONV:
        parts = {"in_proj": (3 * width, width), "conv": (width, 1, config.conv_L_cache), "out_proj": (width, width)}
        shapes |= {f"{name}.conv.{part}.weight": shape for part, shape in parts.items()}
    else:
        narrow = (config.num_key_value_heads * head, width)
        parts = {"q_proj": (width, width), "k_proj": narrow, "v_proj": narrow, "out_proj": (width, width)}
        parts |= {"q_layernorm": (head,), "k_layernorm": (head,)}
        shapes |= {f"{name}.self_attn.{part}.weight": shape for part, shape in parts.items()}
    name += ".feed_forward"
    if layer < config.num_dense_layers:
        return shapes | _swiglu(name, width, config.intermediate_size)
    shapes |= {f"{name}.gate.weight": (config.num_experts, width), f"{name}.expert_bias": (config.num_experts,)}
    for expert in range(config.num_experts):
        shapes |= _swiglu(f"{name}.experts.{expert}", width, config.moe_intermediate_size)
    return shapes


def _swiglu(name: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    shapes = {"w1": (inner, width), "w3": (inner, width), "w2": (width, inner)}
    return {f"{name}.{part}.weight": shape for part, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def add_tokenizer(path: Path) -> Path:
    """Copy the demo's tokenizer there. onnxruntime-genai 0.18 does not load a folder without a tokenizer.

    The demo's tokenizer knows only the first ids of the vocabulary.
    """
    for file in TOKENIZER.glob("*token*"):
        shutil.copy(file, path)
    return path


def spell_out(path: Path) -> Path:
    """Add made-up words to the demo's tokenizer, so that each id has a text. A server's answers have none without."""
    tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    model, rows = tokenizer["model"], json.loads((path / "config.json").read_text())["vocab_size"]
    model["vocab"] |= {made_up_word(i): i for i in range(len(model["vocab"]), rows)}
    model["ignore_merges"] = True  # a word of the vocabulary is a token, also where no merges lead to it
    (path / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return path


def made_up_word(token: int) -> str:
    """A blank, as byte pairs spell it, and letters that no other word has."""
    letters = "".join(string.ascii_lowercase[token // 26**place % 26] for place in range(4))
    return f"\u0120zq{letters}"
