"""What llama.cpp's converter writes of each architecture (`conversion/` in its repository)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar


if TYPE_CHECKING:
    from torch import Tensor


ATTENTION = ("full_attention", "attention")  # in `layer_types`: transformers' name, and that of Granite's files


class Architecture:
    """An architecture of llama.cpp.

    Args:
        config: the checkpoint's config.json.

    Attributes:
        name: in `gguf.MODEL_ARCH`.
        epsilon: the key of the norms' epsilon in config.json.
    """

    name: ClassVar[str]
    epsilon: ClassVar[str]

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def describe(self, writer: Any, weights: Mapping[str, Tensor]) -> None:
        """Write the metadata of the model."""
        config = self.config
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_head_count(config["num_attention_heads"])
        kv_heads = config["num_key_value_heads"]
        writer.add_head_count_kv([kv_heads if kind in ATTENTION else 0 for kind in config["layer_types"]])
        writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
        writer.add_layer_norm_rms_eps(config[self.epsilon])
        writer.add_vocab_size(config["vocab_size"])

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield what becomes of a checkpoint's tensor, under names that gguf's table knows."""
        raise NotImplementedError


class Lfm2(Architecture):
    """The dense LFM2."""

    name, epsilon = "LFM2", "norm_eps"

    def describe(self, writer: Any, weights: Mapping[str, Tensor]) -> None:
        super().describe(writer, weights)
        writer.add_feed_forward_length(len(weights["model.layers.0.feed_forward.w1.weight"]))
        writer.add_shortconv_l_cache(self.config["conv_L_cache"])

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield name, tensor.squeeze(1) if tensor.ndim == 3 else tensor


class Granite(Architecture):
    """Granite 4.0 H without experts."""

    name, epsilon = "GRANITE_HYBRID", "rms_norm_eps"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if not config["mamba_conv_bias"]:
            raise ValueError("llama.cpp ends with a segmentation fault where mamba_conv_bias is false")
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        # By the end of a tensor's name, the end of the new one and what it holds.
        self.forms: dict[str, list[tuple[str, Callable[[Tensor], Tensor]]]] = {
            "shared_mlp.input_linear.weight": [
                ("mlp.gate_proj.weight", lambda both: both.chunk(2)[0]),
                ("mlp.up_proj.weight", lambda both: both.chunk(2)[1]),
            ],
            "shared_mlp.output_linear.weight": [("mlp.down_proj.weight", lambda down: down)],
            "mamba.A_log": [("mamba.A_log", lambda log: -log.float().exp()[:, None])],
            "mamba.D": [("mamba.D", lambda skip: skip[:, None])],
            "mamba.dt_bias": [("mamba.dt_proj.bias", lambda bias: bias)],
            "mamba.norm.weight": [("mamba.norm.weight", lambda norm: norm.reshape(config["mamba_n_groups"], -1))],
            "mamba.conv1d.weight": [("mamba.conv1d.weight", lambda kernel: kernel.squeeze(1))],
            "self_attn.q_proj.weight": [("self_attn.q_proj.weight", lambda query: in_pairs(query, heads))],
            "self_attn.k_proj.weight": [("self_attn.k_proj.weight", lambda key: in_pairs(key, kv_heads))],
        }

    def describe(self, writer: Any, weights: Mapping[str, Tensor]) -> None:
        super().describe(writer, weights)
        config = self.config
        writer.add_feed_forward_length(config["shared_intermediate_size"])
        writer.add_ssm_conv_kernel(config["mamba_d_conv"])
        writer.add_ssm_state_size(config["mamba_d_state"])
        writer.add_ssm_group_count(config["mamba_n_groups"])
        writer.add_ssm_inner_size(config["mamba_expand"] * config["hidden_size"])
        writer.add_ssm_time_step_rank(config["mamba_n_heads"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
        writer.add_rope_scaling_finetuned(config.get("position_embedding_type") == "rope")  # whether there is any

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        start, own = _halves(name)
        for end, form in self.forms.get(own, [(own, lambda same: same)]):
            yield f"{start}{end}", form(tensor)


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows for llama.cpp's rope, which turns neighbours and not the halves of a head."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _halves(name: str) -> tuple[str, str]:
    """Cut `model.layers.0.mamba.D` before `mamba`."""
    parts = name.split(".")
    at = 3 if parts[:2] == ["model", "layers"] else 0
    return "".join(f"{part}." for part in parts[:at]), ".".join(parts[at:])


ARCHITECTURES: dict[str, type[Architecture]] = {"lfm2": Lfm2, "granitemoehybrid": Granite}
