"""llama.cpp through llama-cpp-python's bindings, on a GGUF file written straight from the checkpoint."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from benchmarks.gguf_files import write_gguf
from benchmarks.systems import base


BATCH = 512


def prepare(checkpoint: Path, folder: Path, kind: str) -> None:
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

    def _decode(self, ids: list[int]) -> np.ndarray:
        """The logits of the last of `ids`, for which alone the head is computed; overwritten by the next call."""
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError("llama_decode failed")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.vocabulary,))

    def start(self, ids: list[int]) -> int:
        self._forget()
        for begin in range(0, len(ids), BATCH):
            logits = self._decode(ids[begin : begin + BATCH])
        return int(logits.argmax())

    def step(self, token: int) -> int:
        return int(self._decode([token]).argmax())

    def logits(self, ids: list[int]) -> np.ndarray:
        self._forget()
        return np.stack([self._decode([token]).copy() for token in ids])

    def _forget(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
