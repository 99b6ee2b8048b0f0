"""The table of tiny checkpoints that the tests share, and the gold: transformers on one unpadded row at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Lfm2Config, Lfm2Model, PreTrainedModel

from optimum_lfm2 import compat
from optimum_lfm2.families.bidirectional import MODELS


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

# How each checkpoint differs from BASE: in one knob of Lfm2Config, with a value that a mistake would not survive.
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

# The same for models with experts. They have these options besides BASE.
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1}

MOE_CHECKPOINTS: dict[str, dict] = {
    "moe": {},
    "moe_no_expert_bias": {"use_expert_bias": False},
    "moe_not_normalised": {"norm_topk_prob": False},
    "moe_scaled": {"routed_scaling_factor": 2.5},
    "moe_scaled_not_normalised": {"routed_scaling_factor": 0.6, "norm_topk_prob": False, "use_expert_bias": False},
    "moe_no_dense_layers": {"num_dense_layers": 0},
    "moe_three_dense_layers": {"num_dense_layers": 3},
    "moe_top_1": {"num_experts_per_tok": 1},
    "moe_top_4": {"num_experts_per_tok": 4, "num_experts": 6},
    "moe_all_experts": {"num_experts_per_tok": 3, "num_experts": 3},
    "moe_odd": {"hidden_size": 48, "conv_bias": True, "moe_intermediate_size": 80, "tie_word_embeddings": False},
}
CHECKPOINTS |= {name: MOE | options for name, options in MOE_CHECKPOINTS.items()}

# And for LFM3, on top of these. A text of the tests is several windows long, but where the window says otherwise.
SLIDING = "sliding_attention"
LFM3 = {
    "sliding_window": 8,
    "layer_types": [CONV, SLIDING, ATTENTION, CONV, SLIDING],
    "conv_L_cache": 7,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
}

LFM3_CHECKPOINTS: dict[str, dict] = {
    "lfm3": {},
    "lfm3_window_1": {"sliding_window": 1},
    "lfm3_window_4": {"sliding_window": 4},
    "lfm3_window_longer_than_the_text": {"sliding_window": 200},
    "lfm3_window_as_long_as_a_text_can_be": {"sliding_window": 512},
    "lfm3_no_sandwich": {"use_sandwich_norm": False},
    "lfm3_no_gate": {"use_attention_gate": False},
    "lfm3_bare": {"use_sandwich_norm": False, "use_attention_gate": False, "conv_L_cache": 3},
    "lfm3_attention_bias": {"attention_bias": True},
    "lfm3_conv_bias": {"conv_bias": True},
    "lfm3_untied": {"tie_word_embeddings": False},
    "lfm3_odd_head_dim": {"head_dim": 12},
    "lfm3_multi_query": {"num_key_value_heads": 1},
    "lfm3_multi_head": {"num_key_value_heads": 4},
    "lfm3_sliding_first": {"layer_types": [SLIDING, ATTENTION, CONV, SLIDING, CONV]},
    "lfm3_all_sliding": {"layer_types": [SLIDING] * 5},
    "lfm3_no_sliding": {"layer_types": [ATTENTION, CONV, ATTENTION, CONV, CONV]},
    "lfm3_default_layers": {"layer_types": None},
    "lfm3_norm_eps": {"norm_eps": 0.1},
    "lfm3_rope": {
        "rope_parameters": {
            SLIDING: {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0},
            ATTENTION: {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
        }
    },
}
CHECKPOINTS |= {name: LFM3 | options for name, options in LFM3_CHECKPOINTS.items()}

# And for Granite 4.0 H, on top of BASE but for what its configuration does not have.
MAMBA, GRANITE_ATTENTION = "mamba", "attention"
GRANITE = {
    "layer_types": [MAMBA, GRANITE_ATTENTION, MAMBA, MAMBA, GRANITE_ATTENTION],
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "mamba_n_heads": 8,
    "mamba_d_state": 24,
    "mamba_chunk_size": 16,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.4,
    "logits_scaling": 3.0,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}

# These have several knobs each, since transformers computes their golds slowly.
GRANITE_CHECKPOINTS: dict[str, dict] = {
    "granite": {},
    "granite_rope_and_biases": {
        "position_embedding_type": "rope",
        "rope_theta": 500.0,
        "attention_bias": True,
        "mamba_proj_bias": True,
        "mamba_conv_bias": False,
        "tie_word_embeddings": False,
        "embedding_multiplier": 3.0,
    },
    "granite_groups": {"mamba_n_groups": 2, "num_key_value_heads": 1},
    "granite_wide_without_factors": {
        "layer_types": [GRANITE_ATTENTION, MAMBA, GRANITE_ATTENTION, MAMBA, MAMBA],
        "hidden_size": 48,
        "mamba_expand": 3,
        "mamba_n_heads": 6,
        "mamba_d_head": 24,
        "mamba_d_conv": 3,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 12**-0.5,
        "logits_scaling": 1.0,
        "rms_norm_eps": 0.1,
    },
    "granite_all_mamba": {"layer_types": [MAMBA] * 5},
}
CHECKPOINTS |= {name: GRANITE | options for name, options in GRANITE_CHECKPOINTS.items()}

# And for Olmo-Hybrid, which needs a layer of each kind.
DELTA = "linear_attention"
OLMO = {
    "layer_types": [DELTA, ATTENTION, DELTA, DELTA, ATTENTION],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "pad_token_id": 0,
}

OLMO_CHECKPOINTS: dict[str, dict] = {
    "olmo": {},
    "olmo_rope": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "attention_bias": True,
        "linear_allow_neg_eigval": False,
        "rms_norm_eps": 0.1,
    },
    "olmo_heads_in_groups": {
        "linear_num_key_heads": 2,
        "linear_conv_kernel_dim": 2,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
    "olmo_default_heads": {
        **{f"linear_{name}": None for name in ("num_key_heads", "key_head_dim", "value_head_dim")},
        "layer_types": [ATTENTION, ATTENTION, DELTA, ATTENTION, DELTA],
        "hidden_size": 48,
    },
}
CHECKPOINTS |= {name: OLMO | options for name, options in OLMO_CHECKPOINTS.items()}


# Encoders, on top of BASE. Each name begins with its task's class.
ENCODERS: dict[str, dict] = {
    "encoder": {},
    "encoder_conv_width_5_and_bias": {"conv_L_cache": 5, "conv_bias": True},
    "encoder_conv_width_4": {"conv_L_cache": 4, "hidden_size": 48, "num_key_value_heads": 1},
    "encoder_full_attn_idxs": {
        "layer_types": None,
        "full_attn_idxs": [0, 3],
        "block_auto_adjust_ff_dim": False,
        "rope_theta": 500.0,
    },
    "masked_lm": {},
    "masked_lm_untied": {"tie_word_embeddings": False, "conv_L_cache": 2},
    "token_classifier": {"num_labels": 5},
    "sequence_classifier": {"num_labels": 3},
}
ENCODER_TASKS = {"masked_lm": "fill-mask", "token": "token-classification", "sequence": "text-classification"}


def encoder_task(name: str) -> str:
    """Return the task of an encoder of the table."""
    tasks = [task for start, task in ENCODER_TASKS.items() if name.startswith(start)]
    return tasks[0] if tasks else "feature-extraction"


def encoder_gold(folder: Path, task: str) -> PreTrainedModel:
    """Load an encoder as validation's reference has it."""
    model = MODELS[task](AutoConfig.from_pretrained(folder)).eval()
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    return model


def make_encoder(name: str, folder: Path, **changes: object) -> Path:
    """Save an encoder of the table under `folder`, with the spelling of classes that the vendor's checkpoints have."""
    options, task, path = {**BASE, **ENCODERS[name], **changes}, encoder_task(name), folder / name
    labels = options.pop("num_labels", 2)
    torch.manual_seed(1)
    model = MODELS[task](Lfm2Config(**options, num_labels=labels)).eval()
    vary(model)
    config = model.config
    config.architectures = [
        {"token-classification": "Lfm2BidirP2ForTokenClassification"}.get(task, type(model).__name__)
    ]
    config.auto_map = {"AutoModel": "modeling_lfm2_bidirectional.Lfm2BidirectionalModel"}
    config.save_pretrained(path)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def make_checkpoint(
    name: str, folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32, **changes: object
) -> Path:
    """Save a checkpoint of the table under `folder`. Its weights are such that greedy text varies."""
    options = {**BASE, **CHECKPOINTS[name], **changes}
    torch.manual_seed(seed)
    model = _model(name, options).eval()
    vary(model)
    path = folder / name
    model.to(dtype).save_pretrained(path)
    return path


def make_headless(path: Path, **changes: object) -> Path:
    """Save a dense decoder without a head under `path`, as fine-tunes that make vectors of texts have it."""
    torch.manual_seed(1)
    model = Lfm2Model(Lfm2Config(**{**BASE, **changes})).eval()
    vary(model)
    model.save_pretrained(path)
    return path


def vary(model: PreTrainedModel) -> None:
    """Give the model random weights such that greedy text varies."""
    for parameter_name, parameter in model.named_parameters():
        if "embed" in parameter_name or "lm_head" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif ".experts." in parameter_name:
            torch.nn.init.normal_(parameter, std=2 / parameter.shape[-1] ** 0.5)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 / parameter[0].numel() ** 0.5)
        elif "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("expert_bias"):
            torch.nn.init.normal_(buffer, std=0.2)


def _model(name: str, options: dict) -> PreTrainedModel:
    member = next((member for member, table in TABLES.items() if name in table), "Lfm2")
    if not hasattr(transformers, f"{member}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {member}")
    if member == "GraniteMoeHybrid" and options.get("mamba_n_groups", 1) > 1 and not compat.TRANSFORMERS_5:
        pytest.skip("transformers 4 norms the groups of Mamba-2 together")
    if member not in ("Lfm2", "Lfm2Moe"):
        del options["block_multiple_of"]
    return getattr(transformers, f"{member}ForCausalLM")(getattr(transformers, f"{member}Config")(**options))


TABLES = {
    "Lfm2Moe": MOE_CHECKPOINTS,
    "Lfm3": LFM3_CHECKPOINTS,
    "GraniteMoeHybrid": GRANITE_CHECKPOINTS,
    "OlmoHybrid": OLMO_CHECKPOINTS,
}


def prompts(lengths: list[int], vocab_size: int = 256, seed: int = 1) -> list[torch.Tensor]:
    """Return random token ids of the given lengths, each int64 (length). None of them is a special token."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, vocab_size, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def gold_tokens(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    """Return transformers' greedy tokens after one unpadded row. It runs without a cache, so no cache can be wrong."""
    ids = prompt[None]
    for _ in range(new_tokens):
        logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    tokens = ids[0, len(prompt) :].tolist()
    assert len(set(tokens)) > new_tokens // 3, "a gold that repeats itself proves nothing"
    return tokens


def changed_copy(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a checkpoint of one file into `folder`, and let `change` edit the dictionary of its stored tensors."""
    path = shutil.copytree(source, folder / "changed")
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
