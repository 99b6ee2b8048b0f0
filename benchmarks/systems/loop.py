"""Our graph in a bare session loop: no torch, no copies, every buffer bound once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.systems import base
from benchmarks.systems.ours import file_name


DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class System(base.System):
    def __init__(self, folder: Path, threads: int, length: int, variant: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        path = folder / file_name(variant)
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        pasts = [value for value in self.session.get_inputs() if value.name.startswith("past")]
        presents = [value.name for value in self.session.get_outputs() if value.name.startswith("present")]
        vocabulary = self.session.get_outputs()[0].shape[-1]
        self.mask = np.ones(length, np.int64)
        self.ids = np.zeros(1, np.int64)
        self.kept = np.ones(1, np.int64)
        self.logits = np.empty(vocabulary, DTYPES[self.session.get_outputs()[0].type])
        self.caches = []
        # Keys and values that grow are updated in place. States alternate between two buffers, so even and odd calls
        # have a binding each.
        self.bindings = [self.session.io_binding() for _ in range(2)]
        for value, present in zip(pasts, presents, strict=True):
            grows = not isinstance(value.shape[2], int)
            shape = (1, value.shape[1], length, value.shape[3]) if grows else (1, *value.shape[1:])
            pair = [np.zeros(shape, DTYPES[value.type])]
            pair.append(pair[0] if grows else pair[0].copy())
            self.caches.append(pair)
            for i, binding in enumerate(self.bindings):
                self._bind(binding.bind_input, value.name, pair[i], shape)
                self._bind(binding.bind_output, present, pair[1 - i], shape)
        for binding in self.bindings:
            self._bind(binding.bind_output, "logits", self.logits, (1, 1, vocabulary))
            self._bind(binding.bind_input, "num_logits_to_keep", self.kept, ())

    @staticmethod
    def _bind(bind, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
        bind(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    def _call(self, ids: np.ndarray) -> int:
        binding = self.bindings[self.calls % 2]
        self.calls += 1
        self.length += len(ids)
        self._bind(binding.bind_input, "input_ids", ids, (1, len(ids)))
        self._bind(binding.bind_input, "attention_mask", self.mask, (1, self.length))
        self.session.run_with_iobinding(binding)
        return int(self.logits.argmax())

    def start(self, ids: list[int]) -> int:
        self.calls = self.length = 0
        for pair in self.caches:
            pair[0][:] = 0
        return self._call(np.array(ids, np.int64))

    def step(self, token: int) -> int:
        self.ids[0] = token
        return self._call(self.ids)
