"""GGUF files of checkpoints, as llama.cpp's converter and quantiser make them."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


# Takes a tensor's values and its type, and returns its bytes.
Quantiser = Callable[[np.ndarray, Any], np.ndarray]


def write_gguf(
    checkpoint: Path,
    path: Path,
    kind: Callable[[str, int], str] = lambda name, width: "F32",
    quantise: Quantiser | None = None,
    words: bool = False,
    factors: Mapping[str, float] = {},
) -> None:
    """Write the file of a dense LFM2 checkpoint.

    Args:
        checkpoint: its folder.
        path: the file.
        kind: the type of a matrix, by its name in the file and the length of its rows. What is no matrix stays float32.
        quantise: makes the bytes of types that are not F32.
        words: whether it has a vocabulary. The words stand for their ids alone. llama.cpp's server needs one; its
            library does not.
        factors: of norms, by a part of their names in the file.
    """
    import gguf
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    layers = config["num_hidden_layers"]
    weights = load_file(checkpoint / "model.safetensors")
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LFM2])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(len(weights["model.layers.0.feed_forward.w1.weight"]))
    writer.add_head_count(config["num_attention_heads"])
    kv_heads = config["num_key_value_heads"]
    writer.add_head_count_kv([0 if kind == "conv" else kv_heads for kind in config["layer_types"]])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    writer.add_vocab_size(config["vocab_size"])
    if words:
        _add_words(writer, config["vocab_size"])
    else:
        writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LFM2, layers)
    for name, tensor in weights.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        values = np.ascontiguousarray((tensor.squeeze(1) if tensor.ndim == 3 else tensor).float().numpy())
        values *= next((factor for part, factor in factors.items() if part in target), 1)
        stored = kind(target, values.shape[-1]) if tensor.ndim == 2 else "F32"
        if stored == "F32":
            writer.add_tensor(target, values)
        else:
            of = gguf.GGMLQuantizationType[stored]
            writer.add_tensor(target, quantise(values, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_words(writer: Any, count: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("lfm2")
    writer.add_token_list([f"t{i}" for i in range(count)])
    writer.add_token_types([1] * count)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)  # that nobody writes, so no text ends
    writer.add_add_bos_token(False)


def ggml_quantiser() -> Quantiser:
    """Return ggml's own, from the package xllamacpp."""
    import gguf
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]

    def quantise(values: np.ndarray, kind: Any) -> np.ndarray:
        rows, width = values.shape
        block, size = gguf.GGML_QUANT_SIZES[kind]
        out = np.empty((rows, width // block * size), np.uint8)
        # The first row, the number of rows, and no matrix of importance.
        written = library.ggml_quantize_chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, rows, width, None)
        if written != out.nbytes:
            raise RuntimeError(f"ggml wrote {written} bytes of {kind.name}, not {out.nbytes}")
        return out

    return quantise


def q4_0(name: str, width: int) -> str:
    """LiquidAI's Q4_0 files: the table in Q6_K."""
    return _fitting("Q6_K" if _is_table(name) else "Q4_0", width)


def q8_0(name: str, width: int) -> str:
    """Everything in Q8_0."""
    return "Q8_0"


def q4_k_m(name: str, width: int) -> str:
    """llama.cpp's mix: the table, and values and w2 of every other layer, in Q6_K."""
    wide = _is_table(name) or (("attn_v" in name or "ffn_down" in name) and int(name.split(".")[1]) % 2 == 0)
    return _fitting("Q6_K" if wide else "Q4_K", width)


MIXES = {"Q4_0": q4_0, "Q8_0": q8_0, "Q4_K_M": q4_k_m}


def _is_table(name: str) -> bool:
    return name.startswith(("token_embd.", "output."))


def _fitting(kind: str, width: int) -> str:
    """What llama.cpp's quantiser takes where rows are not whole blocks of 256."""
    return kind if width % 256 == 0 or not kind.endswith("_K") else {"Q6_K": "Q8_0", "Q4_K": "Q5_0"}[kind]
