"""One call of the graph: inputs from torch, outputs to torch, caches in place where the graph allows it."""

from __future__ import annotations

import numpy as np
import torch
from onnxruntime import InferenceSession, IOBinding
from optimum.onnxruntime.utils import TypeHelper

from optimum_lfm2.caches import LOGITS_TO_KEEP
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.layout import GraphLayout


class GraphSession:
    """Runs what the graph takes in one call; `rows.py` brings everything else into that form."""

    def __init__(self, session: InferenceSession, layout: GraphLayout, device: torch.device) -> None:
        self._session = session
        self._layout = layout
        self._device = device
        declared = {value.name: value for value in (*session.get_inputs(), *session.get_overridable_initializers())}
        self._keep_shape = declared[LOGITS_TO_KEEP].shape if layout.keeps_logits else None
        logits = next(value for value in session.get_outputs() if value.name == "logits")
        self._logits_dtype = TypeHelper.ort_type_to_torch_type(logits.type)
        self._names = [value.name for value in session.get_outputs()]

    def new_cache(self, batch_size: int, capacity: int = 0) -> Lfm2Cache:
        """An empty cache with room for `capacity` columns."""
        return Lfm2Cache(self._layout, batch_size, self._device, capacity if self._layout.in_place else 0)

    def run(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Lfm2Cache | None, keep: int, io_binding: bool
    ) -> torch.Tensor:
        """The logits of the last `keep` tokens (0: all), and the cache brought up to date.

        Args:
            ids: int64 (batch_size, sequence_length).
            mask: int64 (batch_size, cache.length + sequence_length).
        """
        sequence = ids.shape[1]
        inputs = {"input_ids": ids.contiguous(), "attention_mask": mask.contiguous()}
        if "position_ids" in self._layout.inputs:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -sequence:].contiguous()
        if self._layout.keeps_logits:
            inputs[LOGITS_TO_KEEP] = torch.full((1,) if self._keep_shape == [1] else (), keep)
        if cache is not None and io_binding and self._layout.in_place:
            logits = self._run_in_place(inputs, cache, min(keep, sequence) or sequence)
        else:
            logits = self._run_copying(inputs, cache)
        if cache is not None:
            cache.length += sequence
        if logits.shape[1] < (min(keep, sequence) or sequence):
            raise Lfm2Error(
                f"This graph gives the logits of the last token alone, not of {keep or sequence}. Pass "
                "logits_to_keep=1, or export it without pruning the head."
            )
        return logits[:, -keep:]

    def _run_in_place(self, inputs: dict[str, torch.Tensor], cache: Lfm2Cache, kept: int) -> torch.Tensor:
        """Past and present keys and values are one buffer; conv states are written beside themselves."""
        batch, sequence = inputs["input_ids"].shape
        cache.reserve(cache.length + sequence)
        binding = self._cache_binding(cache)
        for name, tensor in inputs.items():
            self._bind(binding.bind_input, name, tensor.to(self._device))
        if not self._layout.keeps_logits:
            kept = sequence
        logits = torch.empty((batch, kept, self._layout.vocab_size), dtype=self._logits_dtype, device=self._device)
        self._bind(binding.bind_output, "logits", logits)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        cache.swap()
        return logits

    def _cache_binding(self, cache: Lfm2Cache) -> IOBinding:
        """Prepared once for each of the two states that the buffers alternate between."""
        key = tuple(tensor.data_ptr() for tensor in cache.spare.values())[:1]
        if key not in cache.bindings:
            binding = IOBinding(self._session)
            for tensor in self._layout.caches:
                past = cache.tensors[tensor.past]
                self._bind(binding.bind_input, tensor.past, past)
                self._bind(binding.bind_output, tensor.present, past if tensor.grows else cache.spare[tensor.past])
            cache.bindings[key] = binding
        return cache.bindings[key]

    def _bind(self, bind, name: str, tensor: torch.Tensor) -> None:
        bind(name, self._device.type, self._device.index or 0, _NUMPY[tensor.dtype], tensor.shape, tensor.data_ptr())

    def _run_copying(self, inputs: dict[str, torch.Tensor], cache: Lfm2Cache | None) -> torch.Tensor:
        """Through numpy: for graphs whose caches cannot lie in place, and where io-binding is off."""
        feeds = {name: tensor.numpy(force=True) for name, tensor in inputs.items()}
        if cache is not None:
            for tensor in self._layout.caches:
                past = cache.tensors[tensor.past]
                feeds[tensor.past] = (
                    (past[:, :, : cache.length] if tensor.grows else past).contiguous().numpy(force=True)
                )
        outputs = {
            name: torch.from_numpy(array).to(self._device)
            for name, array in zip(self._names, self._session.run(None, feeds), strict=True)
        }
        if cache is not None:
            for tensor in self._layout.caches:
                cache.tensors[tensor.past] = outputs[tensor.present]
            cache.capacity = cache.length + inputs["input_ids"].shape[1]
            cache.bindings.clear()
        return outputs["logits"]


_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}
