"""`genai_config.json`, from which onnxruntime-genai learns how to run a folder.

An export writes it next to `config.json`. A folder made by onnxruntime-genai's own builder has no `config.json`, so
loading such a folder reads the model's configuration from this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import onnx_ir as ir
from google.protobuf.message import DecodeError
from transformers import Lfm2Config, PretrainedConfig

from optimum_lfm2.caches import CacheTensor, ConvState, head_dim
from optimum_lfm2.errors import Lfm2Error, read_object
from optimum_lfm2.file_names import GENAI_DECODER
from optimum_lfm2.graph.editing import graph_cache_tensors
from optimum_lfm2.graph.member import Member
from optimum_lfm2.loading.config_check import check_fields
from optimum_lfm2.sidecars.genai_decoder import write_decoder
from optimum_lfm2.sidecars.genai_vision import write_pictures


GENAI_CONFIG = "genai_config.json"
TOKENIZER = "tokenizer.json"
LAYER = "%d"
FULL_ATTENTION, CONV = "full_attention", "conv"
MODEL_TYPE = "lfm2"
# The operator that onnxruntime-genai's builder writes (0.18; onnxruntime has it since 1.25.1). Its conv state has
# `conv_L_cache - 1` columns, one less than transformers keeps (tests/interop/test_others.py).
NARROW_CONV = "CausalConvWithState"
# Tokens of a text where the user sets no `max_length`. onnxruntime-genai zeroes a KV cache of that length.
DEFAULT_MAX_LENGTH = 8192


def write_genai_config(
    folder: Path,
    subfolder: str,
    decoder: Path,
    config: PretrainedConfig,
    member: Member,
    caches: Iterable[CacheTensor],
    embedding: Path | None = None,
) -> bool:
    """Write `genai_config.json` beside the tokenizer, and what else onnxruntime-genai needs.

    Args:
        folder: the folder of the tokenizer and of `config.json`.
        subfolder: the subfolder in which the ONNX files lie or will lie.
        decoder: the decoder's file.
        config: the model's configuration.
        member: the record of the model's member.
        caches: the decoder's cache tensors.
        embedding: the embedding's file of a model that takes pictures.

    Returns:
        Whether the file was written. It is not written without a tokenizer, nor for a model, caches or a processor
        that onnxruntime-genai does not support.
    """
    caches = list(caches)
    genai_type = member.with_caches(caches).genai_type
    if genai_type is None or not (folder / TOKENIZER).is_file():
        return False
    pictures = {} if embedding is None else write_pictures(folder, decoder, embedding, config)
    if pictures is None:
        return False
    write_decoder(decoder, folder / subfolder)
    generation = _read(folder / "generation_config.json")
    contents = genai_config(PurePosixPath(subfolder, GENAI_DECODER).as_posix(), genai_type, config, caches, generation)
    contents["model"] |= pictures
    text = json.dumps(contents, indent=2) + "\n"
    (folder / GENAI_CONFIG).write_text(text, encoding="utf-8")
    return True


def genai_config(
    filename: str,
    genai_type: str,
    config: PretrainedConfig,
    caches: Sequence[CacheTensor],
    generation: Mapping[str, Any],
) -> dict[str, Any]:
    """Build the contents of `genai_config.json`.

    Args:
        filename: the decoder's graph, relative to the folder.
        genai_type: what onnxruntime-genai calls the model.
        config: the model's configuration.
        caches: the graph's cache tensors.
        generation: the checkpoint's `generation_config.json`. Its special tokens and sampling settings take
            precedence over those of `config`.
    """
    past: dict[str, str] = {}
    present: dict[str, str] = {}
    growing = {tensor.layer for tensor in caches if tensor.grows}
    decoder = config.get_text_config()
    tokens = "input_ids" if decoder is config else "inputs_embeds"
    for tensor in caches:
        past[f"past_{tensor.role.name}_names"] = _template(tensor.past, tensor.layer)
        present[f"present_{tensor.role.name}_names"] = _template(tensor.present, tensor.layer)

    model: dict[str, Any] = {
        "type": genai_type,
        **_special_tokens(decoder, generation),
        "context_length": decoder.max_position_embeddings,
        "vocab_size": decoder.vocab_size,
        "decoder": {
            "filename": filename,
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "hidden_size": decoder.hidden_size,
            "head_size": head_dim(decoder),
            "num_attention_heads": decoder.num_attention_heads,
            "num_key_value_heads": decoder.num_key_value_heads,
            "num_hidden_layers": decoder.num_hidden_layers,
            # onnxruntime-genai 0.18 reads from these which cache inputs a layer has.
            "layer_types": [FULL_ATTENTION if layer in growing else CONV for layer in range(decoder.num_hidden_layers)],
            "inputs": {tokens: tokens, "attention_mask": "attention_mask", **past},
            "outputs": {"logits": "logits", **present},
        },
    }
    return {"model": model, "search": _search(decoder, generation)}


def read_genai_config(folder: Path) -> Lfm2Config:
    """Read the configuration of a folder that has no `config.json`.

    It comes from `genai_config.json` and from the graph that this file names. Neither of them has the sizes that only
    the weights need, such as the width of the feed-forward. These keep the defaults of transformers.

    Raises:
        Lfm2Error: the model is of another type, or the file is not as onnxruntime-genai writes it.
    """
    path = folder / GENAI_CONFIG
    try:
        model = _read(path)["model"]
        if model["type"] != MODEL_TYPE:
            raise Lfm2Error(
                f"{path} describes a model of type {model['type']}, not {MODEL_TYPE}. "
                "Copy the checkpoint's config.json into that folder."
            )
        decoder = model["decoder"]
        fields = {
            "vocab_size": model["vocab_size"],
            "max_position_embeddings": model["context_length"],
            "head_dim": decoder["head_size"],
            **{name: decoder[name] for name in ("hidden_size", "layer_types", "num_hidden_layers")},
            **{name: decoder[name] for name in ("num_attention_heads", "num_key_value_heads")},
            **{name: model.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        }
        check_fields(fields, str(path))
        return Lfm2Config(conv_L_cache=_conv_width(folder / decoder["filename"]), **fields)
    except Lfm2Error:
        raise
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise Lfm2Error(
            f"{path} does not describe its model ({error!r}). Copy the checkpoint's config.json into that folder."
        ) from error


def is_of_our_type(path: Path) -> bool:
    """Return whether a `genai_config.json` says that its model is LFM2. Return False if it cannot be read."""
    try:
        return _read(path)["model"]["type"] == MODEL_TYPE
    except (KeyError, TypeError, ValueError, OSError):
        return False


def _conv_width(path: Path) -> int:
    """Return `conv_L_cache` of a graph, or transformers' default where the graph has no conv states."""
    try:
        graph = ir.load(path).graph
    except DecodeError as error:
        raise Lfm2Error(f"{path} is no ONNX graph ({error}). Download or copy it again.") from error
    caches = graph_cache_tensors(graph)
    narrow = any(node.op_type == NARROW_CONV for node in graph)
    widths = {cache.axes[1] for cache in caches if isinstance(cache.state, ConvState)}
    width = widths.pop() if widths else Lfm2Config().conv_L_cache
    return int(width) + narrow  # type: ignore[arg-type]  # a symbol is not a number, and raises


def _template(name: str, layer: int) -> str:
    """Replace the layer's number in a cache name by `%d`. No other part of a cache name is a number."""
    return name.replace(str(layer), LAYER)


def _special_tokens(config: PretrainedConfig, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens that there are. onnxruntime-genai opens no folder that has null or -1 for one."""
    tokens = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = generation.get(name)
        value = getattr(config, name, None) if value is None else value
        listed = [one for one in (value if isinstance(value, list) else [value]) if one in range(config.vocab_size)]
        if listed:
            tokens[name] = listed if isinstance(value, list) else listed[0]
    if eos := tokens.get("eos_token_id"):
        tokens.setdefault("pad_token_id", eos[0] if isinstance(eos, list) else eos)
    return tokens


def _search(config: PretrainedConfig, generation: Mapping[str, Any]) -> dict[str, Any]:
    search: dict[str, Any] = {
        "do_sample": False,
        "early_stopping": True,
        "max_length": min(config.max_position_embeddings, DEFAULT_MAX_LENGTH),
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "past_present_share_buffer": True,  # else every step copies all keys and values
    }
    settings = ("do_sample", "repetition_penalty", "temperature", "top_k", "top_p")
    return search | {name: generation[name] for name in settings if generation.get(name) is not None}


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
