"""The weights in an exported file stay as they are, byte for byte, whatever changes around them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from checkpoints import ATTENTION, CONV, make_checkpoint
from optimum.exporters.onnx import main_export
from transformers import AutoModelForCausalLM

from optimum_lfm2 import compat


TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
TINY |= {"num_key_value_heads": 1, "layer_types": [CONV, ATTENTION, CONV]}
# A change here changes the files that users have. Say so in the notes of a release.
DIGESTS = {
    "hybrid": "92ae3fe008f26578e1fed686aadc2909",
    "moe": "f53d0e3bc157e2f21d24c13d29f149fb",
}


def with_exact_weights(name: str, folder: Path, **options) -> Path:
    """Make a checkpoint whose weights are multiples of 1 / 256: every machine computes the same ones."""
    checkpoint = make_checkpoint(name, folder, **options)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for number, parameter in enumerate(model.parameters()):
        values = (torch.arange(parameter.numel()) * 40503 + number) % 255 - 127
        parameter.data = (values / 256).reshape(parameter.shape)
    model.save_pretrained(checkpoint)
    return checkpoint


def digest(path: Path) -> str:
    """Return a hash of the names, the shapes and the bytes of a file's weights."""
    found = hashlib.sha256()
    initializers = ir.load(path).graph.initializers
    for name in sorted(initializers):
        tensor = initializers[name].const_value
        if tensor.dtype == ir.DataType.FLOAT and tensor.nbytes >= 1024:  # the rest are shapes, axes and constants
            found.update(f"{name} {list(tensor.shape)} ".encode())
            found.update(tensor.tobytes())
    return found.hexdigest()[:32]


@pytest.mark.parametrize("name", [name for name in DIGESTS if name != "moe" or "lfm2_moe" not in compat.STAND_INS])
def test_the_weights_of_a_file_are_those_of_before(name, tmp_path):
    options = TINY | ({"num_experts": 4} if name == "moe" else {})
    checkpoint = with_exact_weights(name, tmp_path / "checkpoint", **options)
    main_export(str(checkpoint), tmp_path / "out", do_validation=False)
    assert digest(tmp_path / "out" / "model.onnx") == DIGESTS[name]
