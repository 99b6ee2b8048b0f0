"""onnxruntime-genai runs a published LFM2-VL and gives the tokens of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import asked, drawn, gold_vl_model, gold_vl_tokens, joined, processed, write_png
from transformers import AutoConfig, AutoTokenizer

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration
from optimum_lfm2.families import member_of
from optimum_lfm2.file_names import DECODER, EMBEDDING
from optimum_lfm2.graph.siglip2 import PROCESSOR
from optimum_lfm2.publish.precisions import DEFAULT, published
from optimum_lfm2.sidecars.genai_config import write_genai_config
from optimum_lfm2.sidecars.genai_vision import processor_settings


og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
# The graphs of both releases are the same, node for node: tests/export/test_graph_digests.py.
pytestmark = pytest.mark.once

NEW = 24
QUESTION = "What is in this picture?"


def run(folder, prompt, images) -> tuple[list[int], list[int], dict[str, np.ndarray]]:
    """Return the ids of a prompt, the new tokens, and what the image processor gave."""
    model = og.Model(str(folder))
    inputs = model.create_multimodal_processor()(prompt, images=images)
    params = og.GeneratorParams(model)
    length = inputs["input_ids"].shape()[1]
    params.set_search_options(max_length=length + NEW, do_sample=False)
    generator = og.Generator(model, params)
    generator.set_inputs(inputs)
    while not generator.is_done():
        generator.generate_next_token()
    sequence = generator.get_sequence(0).tolist()
    values = {name: inputs[name].as_numpy() for name in inputs.keys()}  # noqa: SIM118  no mapping
    return sequence[:length], sequence[length:], values


def without_end(folder: Path) -> Path:
    """Let the answer go on after the end of a turn, as the gold does."""
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = 3
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(vl_folder, tmp_path_factory):
    """An export of `export onnx` in fp32."""
    return without_end(shutil.copytree(vl_folder, tmp_path_factory.mktemp("genai") / "vl"))


@pytest.mark.parametrize("sizes", [[(24, 32)], [(24, 32), (16, 16)], []], ids=["a picture", "two", "none"])
def test_tokens_are_transformers(sizes, folder, vl_checkpoint, tmp_path):
    shown = [drawn(*size) for size in sizes]
    prompt = f"<|startoftext|><|im_start|>user\n{'<image>' * len(shown)}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    paths = [str(write_png(tmp_path / f"{i}.png", pixels)) for i, pixels in enumerate(shown)]
    ids, tokens, values = run(folder, prompt, og.Images.open(*paths) if paths else None)
    assert ids == asked(QUESTION, shown, AutoTokenizer.from_pretrained(folder)).tolist()
    tiles = joined([processed(pixels) for pixels in shown]) if shown else None
    if tiles is not None:
        np.testing.assert_allclose(values["pixel_values"], tiles["pixel_values"], atol=1e-6)
        assert values["image_sizes"].tolist() == tiles["spatial_shapes"].tolist()
    assert tokens == gold_vl_tokens(gold_vl_model(vl_checkpoint), torch.tensor(ids), tiles, NEW)


@pytest.mark.parametrize("precision", DEFAULT)
def test_every_precision_gives_our_tokens(precision, vl_hub_folder, tmp_path):
    """A published folder has graphs for one precision. Here they are written for another."""
    folder = shutil.copytree(vl_hub_folder, tmp_path / "vl")
    (chosen,) = (file for file in published(folder) if file.precision == precision)
    written = AutoConfig.from_pretrained(folder)
    decoder, embedding = (chosen.by_part[part] for part in (DECODER, EMBEDDING))
    assert write_genai_config(folder, "onnx", decoder, written, member_of(written), chosen.caches, embedding)
    pixels, tokenizer = drawn(), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.decode(asked(QUESTION, [], tokenizer)).replace("user\n", "user\n<image>")
    ids, tokens, _ = run(without_end(folder), prompt, og.Images.open(str(write_png(tmp_path / "picture.png", pixels))))
    assert ids == asked(QUESTION, [pixels], tokenizer).tolist()
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(folder, file_name=chosen.path.name)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)), **processed(pixels)}
    own = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert tokens == own[0, len(ids) :].tolist()


def test_settings_of_pictures():
    settings = processor_settings(PROCESSOR.defaults | {"resample": 3, "max_image_tokens": 128})
    steps = {step["operation"]["type"]: step["operation"].get("attrs") for step in settings["processor"]["transforms"]}
    assert steps["Resize"]["interpolation"] == "CUBIC"
    assert (steps["Resize"]["min_pixels"], steps["Resize"]["max_pixels"]) == (64 * 32 * 32, 128 * 32 * 32)
