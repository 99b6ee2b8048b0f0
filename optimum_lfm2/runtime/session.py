"""One call of the graph: inputs from torch, outputs to torch, caches in place where the graph allows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnxruntime import InferenceSession, IOBinding
from optimum.onnxruntime.utils import TypeHelper

from optimum_lfm2.caches import LOGITS_TO_KEEP
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.files import FileIdentity
from optimum_lfm2.runtime.layout import GraphLayout


class GraphSession:
    """Runs one call, within the limits of the graph. `rows.py` brings every other call into that form."""

    def __init__(
        self, session: InferenceSession, layout: GraphLayout, device: torch.device, file: FileIdentity
    ) -> None:
        self._session = session
        self._layout = layout
        self._device = device
        self._file = file
        declared = {value.name: value for value in (*session.get_inputs(), *session.get_overridable_initializers())}
        self._keep_shape = declared[LOGITS_TO_KEEP].shape if layout.keeps_logits else None
        logits = next(value for value in session.get_outputs() if value.name == "logits")
        self._logits_dtype = TypeHelper.ort_type_to_torch_type(logits.type)
        self._names = [value.name for value in session.get_outputs()]
        self._kept_tensors: dict[int, torch.Tensor] = {}

    def new_cache(self, batch_size: int, capacity: int = 0) -> Lfm2Cache:
        """Return an empty cache with room for `capacity` columns."""
        return Lfm2Cache(self._layout, batch_size, self._device, capacity if self._layout.in_place else 0)

    def make_room(self, cache: Lfm2Cache, length: int) -> None:
        """Make room for `length` columns at once, if the graph writes keys and values in place."""
        if self._layout.in_place and cache.alone is None:
            cache.reserve(length, exact=True)

    def check_cache(self, cache: Lfm2Cache) -> None:
        """Raise `Lfm2Error` for a cache that this graph cannot continue.

        Layers of equal shape prove nothing: fine-tunes share them. Sessions of one file go on with each other's caches.
        """
        theirs, ours = cache.layout, self._layout
        if (theirs.caches, theirs.shapes, theirs.dtypes) != (ours.caches, ours.shapes, ours.dtypes):
            raise Lfm2Error("The cache belongs to another model, whose layers differ. Start without it.")
        if cache.device != self._device:
            raise Lfm2Error(f"The cache lies on {cache.device}, the model on {self._device}. Start without it.")
        if cache.broken:
            raise Lfm2Error(
                "The cache was interrupted while its rows changed places. Start without it, or from a copy made before."
            )
        if cache.made_by is None:  # it is new, was reset, or was loaded from a file
            cache.made_by = self._file
        elif cache.made_by != self._file:
            raise Lfm2Error(
                f"The cache belongs to another model, which was loaded from {cache.made_by.path}; this one is "
                f"{self._file.path} as it is now. Start without it."
            )

    def run(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Lfm2Cache | None, keep: int, io_binding: bool
    ) -> torch.Tensor:
        """Return the logits of the last `keep` tokens (0: all), and update the cache.

        Args:
            ids: int64 (batch_size, sequence_length).
            mask: int64 (batch_size, cache.length + sequence_length).
        """
        sequence = ids.shape[1]
        inputs = {**self._tokens(ids, cache), "attention_mask": mask.contiguous()}
        if "position_ids" in self._layout.inputs:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -sequence:].contiguous()
        if cache is not None and io_binding and self._layout.in_place:
            logits = self._run_in_place(inputs, cache, keep)
        else:
            logits = self._run_copying(inputs, cache, keep)
        if cache is not None:
            cache.length += sequence
        if logits.shape[1] < (min(keep, sequence) or sequence):
            raise Lfm2Error(
                f"This graph gives the logits of the last token alone, not of {keep or sequence}. Pass "
                "logits_to_keep=1, or export it without pruning the head."
            )
        return logits if logits.shape[1] == keep else logits[:, -keep:]

    def _tokens(self, ids: torch.Tensor, cache: Lfm2Cache | None) -> dict[str, torch.Tensor]:
        """Return the graph's input that says what the tokens are: (batch_size, sequence_length, ...)."""
        return {"input_ids": ids.contiguous()}

    def _run_in_place(self, inputs: dict[str, torch.Tensor], cache: Lfm2Cache, keep: int) -> torch.Tensor:
        """Run with one buffer for past and present keys and values. A new state goes to the state's other buffer."""
        batch, total = inputs["attention_mask"].shape
        sequence = total - cache.length
        cache.reserve(cache.length + sequence)
        # A single token stays or goes: the states before and after it are at hand.
        columns = self._columns(batch, sequence) if cache.record.recording and sequence > 1 else None
        binding = self._prepared(cache, keep, columns is not None)
        inputs = {name: tensor.to(self._device) for name, tensor in inputs.items()}  # they must outlive the run
        for name, tensor in inputs.items():
            self._bind(binding.bind_input, name, tensor)
        kept = (min(keep, sequence) or sequence) if self._layout.keeps_logits else sequence
        shape: Any = (batch, kept, self._layout.vocab_size)  # a graph that runs in place declares its vocabulary
        logits = torch.empty(shape, dtype=self._logits_dtype, device=self._device)
        self._bind(binding.bind_output, "logits", logits)
        if columns is not None:
            for state in self._layout.states:
                self._bind(binding.bind_output, state.columns, columns[state.past])
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        cache.swap()
        cache.record.columns = columns
        return logits

    def _columns(self, batch: int, sequence: int) -> dict[str, torch.Tensor] | None:
        """Return buffers for the columns that a call adds to each state, or None if the graph does not give them."""
        if not self._layout.gives_columns:
            return None
        sizes: Any = self._layout.shapes  # those of states are numbers
        return {
            name: torch.empty(
                (batch, sizes[name][0], sequence, *sizes[name][2:]),
                dtype=self._layout.dtypes[name],
                device=self._device,
            )
            for name in (state.past for state in self._layout.states)
        }

    def _prepared(self, cache: Lfm2Cache, keep: int, columns: bool) -> IOBinding:
        """Return a binding of all that does not change between calls. Each turn of the state buffers has one.

        An output that is bound is computed, so calls with columns have bindings of their own.
        """
        if cache.bound_to is not self._session:  # a cache of another session of the same graph, or loaded from a file
            cache.bindings.clear()
            cache.bound_to = self._session
        turn = next((tensor.data_ptr() for tensor in cache.spare.values()), None)
        key = keep, columns, turn
        if key not in cache.bindings:
            binding = IOBinding(self._session)
            for tensor in self._layout.caches:
                past = cache.tensors[tensor.past]
                self._bind(binding.bind_input, tensor.past, past)
                self._bind(binding.bind_output, tensor.present, past if tensor.grows else cache.spare[tensor.past])
            if self._layout.keeps_logits:
                self._bind(binding.bind_input, LOGITS_TO_KEEP, self._kept(keep))
            cache.bindings[key] = binding
        return cache.bindings[key]

    def _kept(self, keep: int) -> torch.Tensor:
        """Return `num_logits_to_keep` as a tensor. Each value has its own, since a binding only points to it."""
        if keep not in self._kept_tensors:
            shape = (1,) if self._keep_shape == [1] else ()
            self._kept_tensors[keep] = torch.full(shape, keep, device=self._device)
        return self._kept_tensors[keep]

    def _bind(self, bind, name: str, tensor: torch.Tensor) -> None:
        bind(name, self._device.type, self._device.index or 0, _NUMPY[tensor.dtype], tensor.shape, tensor.data_ptr())

    def _run_copying(self, inputs: dict[str, torch.Tensor], cache: Lfm2Cache | None, keep: int) -> torch.Tensor:
        """Run through numpy: the graph cannot write caches in place, or io-binding is off."""
        feeds = {name: tensor.numpy(force=True) for name, tensor in inputs.items()}
        if self._layout.keeps_logits:
            feeds[LOGITS_TO_KEEP] = self._kept(keep).numpy(force=True)
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
            cache.capacity = inputs["attention_mask"].shape[1]
            cache.bindings.clear()
            if cache.record.recording and self._layout.gives_columns:
                cache.record.columns = {state.past: outputs[state.columns] for state in self._layout.states}
        return outputs["logits"]


_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int8: np.int8, torch.int64: np.int64}
