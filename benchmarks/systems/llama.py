"""llama.cpp through llama-cpp-python's bindings, on a GGUF file written straight from the checkpoint."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np

from benchmarks.systems import base


BATCH = 512


def prepare(checkpoint: Path, folder: Path, kind: str) -> None:
    """Write the GGUF file and quantise it."""
    import llama_cpp

    source = folder / "model.F32.gguf"
    write_gguf(checkpoint, source)
    if kind == "F32":
        return
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    target = folder / f"model.{kind}.gguf"
    if llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(parameters)) != 0:
        raise RuntimeError(f"llama.cpp could not quantise {source} to {kind}")
    source.unlink()


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write the checkpoint in float32. It has no vocabulary, since the benchmark passes ids."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    layers = config["num_hidden_layers"]
    weights = {name: tensor.float().numpy() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
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
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LFM2, layers)
    for name, tensor in weights.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, np.ascontiguousarray(tensor.squeeze(1) if tensor.ndim == 3 else tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class System(base.System):
    def __init__(self, folder: Path, threads: int, length: int, kind: str) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(bytes(folder / f"model.{kind}.gguf"), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {folder}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = length, BATCH, BATCH
        context.n_threads = context.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _decode(self, ids: list[int]) -> int:
        # This computes the head only for the last token of the call.
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError("llama_decode failed")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def start(self, ids: list[int]) -> int:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        for begin in range(0, len(ids), BATCH):
            token = self._decode(ids[begin : begin + BATCH])
        return token

    def step(self, token: int) -> int:
        return self._decode([token])
