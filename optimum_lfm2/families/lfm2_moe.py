"""LFM2 with experts in its later layers. This file has only the differences from the dense LFM2.

The reference is transformers' `modeling_lfm2_moe.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PretrainedConfig

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import lfm2
from optimum_lfm2.fields import FLAG, POSITIVE, SIZE, Field, contradiction
from optimum_lfm2.graph.blocks import feed_forward
from optimum_lfm2.graph.experts import expert_blocks, place_experts, sparse_feed_forward
from optimum_lfm2.graph.member import FeedForward, Member
from optimum_lfm2.weights.blocks import Blocks, Scheme
from optimum_lfm2.weights.experts import MoeCheckpoint, is_packed
from optimum_lfm2.weights.gguf import GgufFields


def dense_then_sparse(config: PretrainedConfig) -> Sequence[FeedForward]:
    """Return the feed-forward of each layer: a SwiGLU in the first `num_dense_layers`, then experts."""
    dense = min(config.num_dense_layers, config.num_hidden_layers)
    sparse = partial(sparse_feed_forward, config=config)
    return [*[feed_forward] * dense, *[sparse] * (config.num_hidden_layers - dense)]


def check_scheme(scheme: Scheme, config: PretrainedConfig) -> None:
    """Raise `Lfm2Error` if QMoE cannot take the experts' matrices in the scheme's blocks."""
    expert_blocks(scheme, (config.hidden_size, config.moe_intermediate_size))


def tolerance(scheme: Scheme) -> float:
    """Return the relative error that validation accepts, or 0 where the common tolerance serves.

    In 8 bits QMoE differs by 3 % from its dequantised weights; in 4 bits it does not (onnxruntime 1.32, CPU).
    """
    experts: list[Blocks | None] = [blocks for name, blocks in scheme.stored.items() if is_packed(name)]
    experts = experts or [scheme.linear]
    return 0.1 if any(blocks is not None and blocks.bits == 8 for blocks in experts) else 0.0


def check_experts(config: Mapping[str, Any]) -> None:
    """Raise `Lfm2Error` where a token uses more experts than there are."""
    experts, used = config.get("num_experts"), config.get("num_experts_per_tok")
    if experts and used and used > experts:
        raise contradiction("config.json", f"num_experts_per_tok is {used}", f"num_experts {experts}")


SIGMOID = 2  # of `expert_gating_func`: llama.cpp's number of the function that LFM2 routes by
FIELDS = {
    "moe_intermediate_size": SIZE,
    "num_experts": Field(int, 1, 4096),
    "num_experts_per_tok": Field(int, 1, 4096),
    "num_dense_layers": Field(int, 0, 1024),
    "routed_scaling_factor": POSITIVE,
    "use_expert_bias": FLAG,
    "norm_topk_prob": FLAG,
    "output_router_logits": FLAG,
}


def config_of_gguf(fields: GgufFields) -> dict[str, Any]:
    """Return the config.json of a GGUF file of the architecture `lfm2moe`."""
    names = fields.file.tensors
    gating = fields.take("expert_gating_func", int, SIGMOID)
    if gating != SIGMOID or not fields.take("expert_weights_norm", bool, True):
        raise Lfm2Error(f"{fields.file.path} routes otherwise than LFM2 does. Export the original checkpoint.")
    return {
        **lfm2.decoder_of_gguf(fields),
        "model_type": "lfm2_moe",
        "architectures": ["Lfm2MoeForCausalLM"],
        "rope_theta": fields.take("rope.freq_base", float),
        "moe_intermediate_size": fields.take("expert_feed_forward_length", int),
        "num_dense_layers": fields.take("leading_dense_block_count", int),
        "num_experts": fields.take("expert_count", int),
        "num_experts_per_tok": fields.take("expert_used_count", int),
        "norm_topk_prob": True,
        "use_expert_bias": any(name.endswith(".expert_bias") for name in names),
        "routed_scaling_factor": fields.take("expert_weights_scale", float, 1.0),
    }


MEMBER = Member(
    model_type="lfm2_moe",
    architectures={"Lfm2MoeForCausalLM": "text-generation", "Lfm2MoeModel": "feature-extraction"},
    min_transformers="5.0.0",
    layer_kinds=lfm2.LAYER_KINDS,
    feed_forwards=dense_then_sparse,
    rotary=lfm2.rotary_of("pos_emb"),
    checkpoint=MoeCheckpoint,
    check_scheme=check_scheme,
    fields=FIELDS,
    check=check_experts,
    passes=(place_experts,),
    tolerance=tolerance,
    genai_type="lfm2_moe",
    gguf={"lfm2moe": config_of_gguf},
)
