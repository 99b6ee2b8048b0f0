"""GGUF files of checkpoints, as llama.cpp's converter and quantiser make them."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gguf_architectures import ARCHITECTURES


# Takes a tensor's values and its type, and returns its bytes.
Quantiser = Callable[[np.ndarray, Any], np.ndarray]

# Takes gguf's writer and the number of ids, and writes their words.
Vocabulary = Callable[[Any, int], None]


def write_gguf(
    checkpoint: Path,
    path: Path,
    kind: Callable[[str, int], str] = lambda name, width: "F32",
    quantise: Quantiser | None = None,
    factors: Mapping[str, float] = {},
    vocabulary: Vocabulary | None = None,
) -> None:
    """Write the file of a checkpoint of one of `gguf_architectures.ARCHITECTURES`.

    Args:
        checkpoint: its folder.
        path: the file.
        kind: the type of a matrix, by its name in the file and the length of its rows. What is no matrix stays float32.
        quantise: makes the bytes of types that are not F32.
        factors: of norms, by a part of their names in the file.
        vocabulary: writes it; by default `add_words`.
    """
    import gguf
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    weights = load_file(checkpoint / "model.safetensors")
    architecture = ARCHITECTURES[config["model_type"]](config)
    known = gguf.MODEL_ARCH[architecture.name]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[known])
    architecture.describe(writer, weights)
    (vocabulary or add_words)(writer, config["vocab_size"])
    names = gguf.get_tensor_name_map(known, config["num_hidden_layers"])
    for name, tensor in weights.items():
        for own, value in architecture.tensors(name, tensor):
            target = names.get_name(own, try_suffixes=(".weight", ".bias"))
            values = np.ascontiguousarray(value.float().numpy())
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


def token_of(word: str) -> int:
    """Return the id for which a word of `add_words` stands."""
    return int(word.removeprefix("t"))


def add_words(writer: Any, count: int) -> None:
    """Write a vocabulary whose words stand for their ids alone."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("lfm2")
    writer.add_token_list([f"t{i}" for i in range(count)])
    writer.add_token_types([1] * count)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)  # that nobody writes, so no text ends
    writer.add_add_bos_token(False)


def tokenizer_of(checkpoint: Path) -> Vocabulary:
    """Return what writes a checkpoint's tokenizer of LFM2's kind, as the converter does (`get_vocab_base`)."""
    import gguf

    stored = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((checkpoint / "config.json").read_text())
    words = {i: text for text, i in stored["model"]["vocab"].items()}
    kinds = dict.fromkeys(words, gguf.TokenType.NORMAL)
    for token in stored["added_tokens"]:
        words[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED

    def add(writer: Any, count: int) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("lfm2")
        writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(count)])
        writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in range(count)])
        writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in stored["model"]["merges"]])
        writer.add_bos_token_id(config["bos_token_id"])
        writer.add_eos_token_id(config["eos_token_id"])
        writer.add_add_bos_token(True)

    return add


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
