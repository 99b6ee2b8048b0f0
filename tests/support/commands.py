"""What tests of exports share: what a file computes, how a folder looks after a failure, a checkpoint of pickles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from checkpoints import prompts
from safetensors.torch import load_file


def assert_unharmed(out: Path) -> None:
    assert {path.name: path.read_text() for path in out.iterdir()} == {"model.onnx": "old", "notes.txt": "mine"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def run_file(folder: Path) -> np.ndarray:
    """Return the first output of the model in `folder`, for one prompt on empty caches."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    (prompt,) = prompts([9])
    inputs = {"input_ids": prompt[None].numpy(), "attention_mask": np.ones((1, 9), dtype=np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            shape = [{"batch_size": 1, "past_sequence_length": 0}.get(size, size) for size in value.shape]
            inputs[value.name] = np.zeros(shape, np.float16 if "float16" in value.type else np.float32)
    return session.run(None, inputs)[0]


def pickled(source: Path) -> str:
    """Turn a checkpoint into one of a `.bin` file that lacks a tensor. Return what the refusal says."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    del tensors["model.layers.1.feed_forward.w1.weight"]
    torch.save(tensors, source / "pytorch_model.bin")
    return "save_pretrained("
