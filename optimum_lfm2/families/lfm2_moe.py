"""LFM2 with experts in its later layers. This file has only the differences from the dense LFM2.

The reference is transformers' `modeling_lfm2_moe.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PretrainedConfig

from optimum_lfm2.families import lfm2
from optimum_lfm2.fields import FLAG, POSITIVE, SIZE, Field, contradiction
from optimum_lfm2.graph.blocks import feed_forward
from optimum_lfm2.graph.experts import expert_blocks, place_experts, sparse_feed_forward
from optimum_lfm2.graph.member import FeedForward, Member
from optimum_lfm2.weights.blocks import Scheme
from optimum_lfm2.weights.experts import MoeCheckpoint


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
    return 0.1 if scheme.linear.bits == 8 else 0.0


def check_experts(config: Mapping[str, Any]) -> None:
    """Raise `Lfm2Error` where a token uses more experts than there are."""
    experts, used = config.get("num_experts"), config.get("num_experts_per_tok")
    if experts and used and used > experts:
        raise contradiction("config.json", f"num_experts_per_tok is {used}", f"num_experts {experts}")


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
)
