"""Transformers' own processor of pictures in front of an export, with picture files of several sizes.

`processor_child.py` runs what needs torchvision. The gold is made here: transformers on what the processor returned.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision_python
from pictures import gold_vl_model, gold_vl_tokens
from transformers import AutoTokenizer

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration


pytestmark = pytest.mark.skipif(
    not torchvision_python.is_installed(), reason="no torchvision: `make test` installs one for the tests"
)
TESTS = Path(__file__).parent
SUPPORT = TESTS / "support"
PICTURE = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
NEW = 32


@pytest.fixture(scope="module")
def folder(exported):
    return exported("trained_vision", variant="default")


@pytest.fixture(scope="module")
def child(folder, tmp_path_factory):
    """The folder in which the child has run."""
    path = tmp_path_factory.mktemp("processor")
    (path / "lfm2_vl_onnx").symlink_to(folder)
    settings = os.environ | {"PYTHONPATH": str(TESTS.parent / "demo"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SUPPORT / "torchvision_python.py", SUPPORT / "processor_child.py", "lfm2_vl_onnx"]
    subprocess.run(command, cwd=path, env=settings, check=True)
    return path


@pytest.fixture(scope="module")
def inputs(child):
    return torch.load(child / "inputs.pt")


@pytest.fixture(scope="module")
def said(child):
    return json.loads((child / "said.json").read_text())


@pytest.fixture(scope="module")
def gold(inputs, checkpoint):
    """Transformers' tokens for each picture, on the unpadded row."""
    model = gold_vl_model(checkpoint("trained_vision"))
    return {
        name: gold_vl_tokens(model, given["input_ids"][0], {key: given[key] for key in PICTURE}, NEW)
        for name, given in inputs.items()
        if "input_ids" in given
    }


def test_the_export_says_what_transformers_says_of_every_picture(folder, inputs, gold):
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(folder)
    for name, tokens in gold.items():
        given = {key: inputs[name][key] for key in ("input_ids", "attention_mask", *PICTURE)}
        out = model.generate(**given, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert out[0, given["input_ids"].shape[1] :].tolist() == tokens, name
    assert len(inputs["tiled"]["spatial_shapes"]) > 2
    assert len({tuple(tokens) for tokens in gold.values()}) > len(gold) // 2


def test_the_demo_makes_the_same_patches_without_torchvision(inputs):
    for name in [name for name in inputs if f"{name}, by the demo" in inputs and name != "tiled"]:
        demo = inputs[f"{name}, by the demo"]
        for key in PICTURE:
            # A level of 255 is 2/255: without AVX2 torchvision rounds the resized pixels another way.
            torch.testing.assert_close(demo[key], inputs[name][key].to(demo[key].dtype), rtol=0, atol=0.01)


def test_snippets_the_pipeline_and_the_demo_answer(said, gold, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def answer(name: str) -> str:
        tokens = gold[name]
        return tokenizer.decode(tokens[: tokens.index(tokenizer.eos_token_id)])

    assert said["ask"] == f"Describe the picture. {answer('photo')}"
    assert said["pipeline"][0]["generated_text"] == answer("photo")
    assert said["snippets"] == {page: f"{answer('picture.jpg')}\n" for page in ("README.md", "docs/vision.md")}


def test_a_broken_picture_is_one_line(said):
    assert "truncated" in said["broken"]
    assert said["broken, asked"].startswith("broken.png is no picture that can be read")
    assert "\n" not in said["broken"] + said["broken, asked"]
