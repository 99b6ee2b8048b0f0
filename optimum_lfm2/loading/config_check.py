"""Check a `config.json`: the type and range of each field that something computes with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optimum.utils import logging
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import MODEL_TYPES, member_of
from optimum_lfm2.fields import FLAG, NUMBER_TYPES, POSITIVE, SIZE, TOKEN, Field, contradiction, ropes


QUANTIZATION = "quantization_config"

logger = logging.get_logger(__name__)
JS_CONFIG = "transformers.js_config"  # the field of Transformers.js, which describes the ONNX files beside it

# The fields of all members. A record adds its own. The upper limits are for wrong numbers, which would take all memory
# or time before the shapes of the weights contradict them: a module is made for each layer, a rotary table has a row
# for each position, and each expert is looked up by name.
FIELDS = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "block_ff_dim": SIZE,
    "num_hidden_layers": Field(int, 1, 1024),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": Field(int, 1, 2**16, optional=True),
    "max_position_embeddings": Field(int, 1, 2**22),
    "conv_L_cache": Field(int, 1, 1024),
    "block_multiple_of": SIZE,
    "block_ffn_dim_multiplier": Field(float, 1e-3, 1e3, optional=True),
    "full_attn_idxs": Field(int, 0, 1023, optional=True, many=True),
    "layer_types": Field(str, optional=True, many=True),
    "norm_eps": Field(float, 0, 1),
    "initializer_range": Field(float, 0, 1e3),
    "rope_theta": POSITIVE,
    "theta": POSITIVE,
    "partial_rotary_factor": Field(float, 1, 1),  # the graph turns the whole head
    "rope_scaling": Field(dict, optional=True),
    "rope_parameters": Field(dict, optional=True),
    "conv_bias": FLAG,
    "block_auto_adjust_ff_dim": FLAG,
    "tie_word_embeddings": FLAG,
    "tie_embedding": FLAG,
    "use_cache": FLAG,
    "bos_token_id": TOKEN,
    "pad_token_id": TOKEN,
    "eos_token_id": Field(int, -1, 2**31 - 1, optional=True, listed=True),
    "dtype": Field(str, optional=True, values=NUMBER_TYPES),
    "torch_dtype": Field(str, optional=True, values=NUMBER_TYPES),
    "architectures": Field(str, optional=True, many=True),
    "auto_map": Field(dict, optional=True),
    "transformers_version": Field(str, optional=True),
    "_name_or_path": Field(str, optional=True),
    "return_dict": FLAG,
    "output_hidden_states": FLAG,
    "output_attentions": FLAG,
}

ROPE_FIELDS = {
    "rope_type": Field(str),
    "type": Field(str),
    "rope_theta": POSITIVE,
    "factor": Field(float, 1, 1e6),
    "partial_rotary_factor": Field(float, 1, 1),
    "original_max_position_embeddings": Field(int, 1, 2**22),
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "attention_factor": Field(float, 1e-30, 1e30, optional=True),
    "beta_fast": Field(float, 1e-30, 1e30, optional=True),
    "beta_slow": Field(float, 1e-30, 1e30, optional=True),
    "mscale": Field(float, 0, 1e30, optional=True),
    "mscale_all_dim": Field(float, 0, 1e30, optional=True),
    "truncate": FLAG,
}
ROPE_NEEDS = {
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def check_fields(config: Mapping[str, Any], name: str = "config.json") -> None:
    """Refuse a configuration that no model can have, before any work.

    Args:
        config: the contents of a `config.json`. A field that is missing has transformers' default. The record of the
            `model_type` adds fields.
        name: the file's name for the error.

    Raises:
        Lfm2Error: a field has a wrong type or is outside its range, or two fields contradict each other.
    """
    own = member_of(config).fields if config.get("model_type") in MODEL_TYPES else {}
    _check_table(config, {**FIELDS, **own}, name)
    rope_fields = {field: own.get(field, rule) for field, rule in ROPE_FIELDS.items()}
    for field, rope in ropes(config):
        _check_table(rope, rope_fields, f"{field} in {name}")
        rope_type = rope.get("rope_type", rope.get("type"))
        if missing := [needed for needed in ROPE_NEEDS.get(rope_type, ()) if needed not in rope]:
            raise Lfm2Error(f"{field} in {name} has no {missing[0]}, which {rope_type} needs. Copy it again.")
        low, high = (rope.get(f"{side}_freq_factor") for side in ("low", "high"))
        if low is not None and high is not None and low >= high:
            raise Lfm2Error(f"{field} in {name} has low_freq_factor {low} from high_freq_factor {high} on.")
    _check_layers(config, name)
    _check_heads(config, name)
    pad, words = config.get("pad_token_id"), config.get("vocab_size")
    if pad is not None and words is not None and pad >= words:
        raise contradiction(name, f"pad_token_id is {pad}", f"vocab_size {words}")


def loaded_config(
    model_name_or_path: str | Path, tell: Callable[[str], None] = logger.info, **where: Any
) -> PretrainedConfig:
    """Load a model's configuration with transformers, and `mend` it. Its fields are checked already.

    Args:
        model_name_or_path: the folder, or the id on the Hub.
        tell: gets a sentence on whatever is read otherwise than transformers reads it.
        where: `subfolder`, `revision` and the like, as `AutoConfig.from_pretrained` takes them.

    Raises:
        Lfm2Error: transformers refuses it. 5.24 is stricter than 4.57: it refuses 0 for 0.0.
    """
    try:
        written, _ = PretrainedConfig.get_config_dict(model_name_or_path, **where)
        if has_null_quantization(written):  # transformers 4.57 fails on it, and 5.24 keeps it
            rest = {name: value for name, value in written.items() if name != QUANTIZATION}
            config: PretrainedConfig = CONFIG_MAPPING[written["model_type"]].from_dict(rest)
        else:
            config = AutoConfig.from_pretrained(model_name_or_path, **where)
    except OSError:
        raise  # of the Hub
    except Exception as error:  # transformers 5 has classes of its own for them, and 4 has not
        said = " ".join(str(error).split())[:300]
        raise Lfm2Error(
            f"transformers cannot use the config.json of {model_name_or_path}: {said} Correct it, or copy it again."
        ) from error
    for sentence in mend(config):
        tell(f"{model_name_or_path}: {sentence}")
    return config


def has_null_quantization(written: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` says by null that the weights are not quantised, as training tools write it."""
    return QUANTIZATION in written and written[QUANTIZATION] is None


def mend(config: PretrainedConfig) -> list[str]:
    """Correct what transformers reads of a configuration otherwise than its checkpoint was trained, in place.

    It loses the names of the checkpoint's code (`auto_map`) too, so that nothing that is made of it runs or copies any,
    and Transformers.js' settings, which are of other ONNX files than those that an export writes.

    Returns:
        A sentence on whatever is read otherwise than transformers reads it.
    """
    for field in ("auto_map", JS_CONFIG):
        vars(config).pop(field, None)
    if config.model_type not in MODEL_TYPES:
        return []
    member = member_of(config)
    return member.mend(config) + (mend(getattr(config, member.text)) if member.text else [])


def _check_table(config: Mapping[str, Any], fields: Mapping[str, Field], name: str) -> None:
    for field, rule in fields.items():
        if field in config and not rule.takes(config[field]):
            shown = json.dumps(config[field])
            shown = shown if len(shown) < 60 else f"{shown[:57]}..."
            raise Lfm2Error(f"{field} in {name} is {shown}; it has to be {rule}. Correct it, or copy the file again.")


def _check_layers(config: Mapping[str, Any], name: str) -> None:
    layers, types = config.get("num_hidden_layers"), config.get("layer_types")
    if types is not None and layers != len(types):
        said = "is not there" if layers is None else f"is {layers}"
        raise contradiction(name, f"num_hidden_layers {said}", f"layer_types has {len(types)}")


def _check_heads(config: Mapping[str, Any], name: str) -> None:
    hidden, heads, groups = (
        config.get(field) for field in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    if heads and groups and heads % groups:
        raise contradiction(name, f"num_attention_heads is {heads}", f"num_key_value_heads {groups} does not divide it")
    size = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    if size is not None and (size < 1 or size % 2):
        raise contradiction(name, f"heads are {size} wide", "rotary positions take an even width")
