"""Write tiny GGUF files as llama.cpp's converter writes them (conversion/lfm2.py), by the library `gguf`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter, quants
from transformers import PretrainedConfig, PreTrainedModel


# Written once more: with the package's own table a test would see no fault of it.
NAMES = {
    r"model\.embed_tokens\.": "token_embd.",
    r"model\.embedding_norm\.": "token_embd_norm.",
    r"lm_head\.": "output.",
    r"model\.layers\.": "blk.",
    r"operator_norm": "attn_norm",
    r"self_attn\.([qkv])_proj": r"attn_\1",
    r"self_attn\.(out|o)_proj": "attn_output",
    r"self_attn\.([qk])_(layer)?norm": r"attn_\1_norm",
    r"feed_forward\.w1\.": "ffn_gate.",
    r"feed_forward\.w2\.": "ffn_down.",
    r"feed_forward\.w3\.": "ffn_up.",
    r"\.conv\.in_proj": ".shortconv.in_proj",
    r"\.conv\.out_proj": ".shortconv.out_proj",
    r"\.conv\.conv": ".shortconv.conv",
    r"feed_forward\.gate\.": "ffn_gate_inp.",
    r"feed_forward\.experts\.w1\.": "ffn_gate_exps.",
    r"feed_forward\.experts\.w2\.": "ffn_down_exps.",
    r"feed_forward\.experts\.w3\.": "ffn_up_exps.",
    r"feed_forward\.expert_bias": "exp_probs_b.bias",
}


def gguf_name(name: str) -> str:
    """Return what a GGUF file calls a tensor of transformers."""
    for own, other in NAMES.items():
        name = re.sub(own, other, name)
    return name


def random_blocks(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return random blocks of a type that the library cannot quantise to, with scales that make values of about 0.1."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    stored = random.integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)
    halves = {"Q6_K": [208], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q2_K": [80, 82]}.get(kind, [0])
    for at in halves:
        stored[:, at : at + 2] = (random.uniform(0.5, 1.5, len(stored)) * 1e-4).astype("<f2")[:, None].view(np.uint8)
    return stored.reshape(*shape[:-1], -1)


def stored_as(kind: str, value: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a tensor's blocks in a type. Of those that the library cannot write, they are random."""
    try:
        return quants.quantize(value, GGMLQuantizationType[kind])
    except NotImplementedError:
        return random_blocks(kind, value.shape, seed)


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    kinds: Callable[[str], str] | Mapping[str, str],
    architecture: str = "lfm2",
    changes: Callable[[GGUFWriter], None] = lambda writer: None,
) -> dict[str, np.ndarray]:
    """Write a model's file.

    Args:
        model: a model of transformers.
        path: the file.
        kinds: the type of each matrix, by its name in the file.
        architecture: what `general.architecture` says.
        changes: adds to the metadata, before it is written.

    Returns:
        The dequantised tensors by transformers' names, as the library reads what it wrote.
    """
    writer = GGUFWriter(path, architecture)
    _describe(writer, model.config)
    changes(writer)
    values = {}
    tensors: dict[str, torch.Tensor] = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        owner, whole = name.removesuffix("gate_up_proj"), tensors.pop(name)
        tensors[f"{owner}w1.weight"], tensors[f"{owner}w3.weight"] = whole.chunk(2, dim=1)
        tensors[f"{owner}w2.weight"] = tensors.pop(f"{owner}down_proj")
    for i, (name, tensor) in enumerate(tensors.items()):
        own, value = gguf_name(name), tensor.float().numpy()
        own, value = (own, value[:, 0]) if value.ndim == 3 and "conv" in own else (own, value)
        kind = "F32"
        if value.ndim >= 2 and "conv.conv" not in name and "inp" not in own:
            kind = kinds(own) if callable(kinds) else kinds[own]
        blocks = stored_as(kind, np.ascontiguousarray(value), i)
        raw = None if kind in ("F32", "F16") else GGMLQuantizationType[kind]
        writer.add_tensor(own, blocks, raw_dtype=raw)
        values[name] = quants.dequantize(blocks, GGMLQuantizationType[kind]).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _describe(writer: GGUFWriter, config: PretrainedConfig) -> None:
    rope: Any = getattr(config, "rope_parameters", None) or {}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([0 if kind == "conv" else config.num_key_value_heads for kind in config.layer_types])
    writer.add_rope_freq_base(rope.get("rope_theta") or config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_shortconv_l_cache(config.conv_L_cache)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(config.intermediate_size)
    if hasattr(config, "num_experts"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_leading_dense_block_count(config.num_dense_layers)
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (token := getattr(config, f"{name}_token_id")) is not None:
            add(token)


def loaded(model: PreTrainedModel, values: Mapping[str, np.ndarray]) -> PreTrainedModel:
    """Return the model with the dequantised tensors."""
    state = {name: torch.from_numpy(value.copy()) for name, value in values.items()}
    for name in [name for name in state if name.endswith("experts.w1.weight")]:
        owner = name.removesuffix("w1.weight")
        state[f"{owner}gate_up_proj"] = torch.cat([state.pop(name), state.pop(f"{owner}w3.weight")], dim=1)
        state[f"{owner}down_proj"] = state.pop(f"{owner}w2.weight")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    return model.eval()
