"""Transformers.js in node runs a published LFM2-VL, and gives the tokens of transformers from the same pixel values."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from clients import case, up_to_end
from node import NEEDS_NODE, WEB
from pictures import asked, drawn, gold_vl_model, gold_vl_tokens, pictures, processed, row, write_png
from test_node import ask
from transformers import AutoTokenizer

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration
from optimum_lfm2.publish.precisions import DEFAULT, PRECISIONS


# The graphs of both releases are the same, node for node: tests/export/test_graph_digests.py.
pytestmark = [*NEEDS_NODE, pytest.mark.once]

NEW = 32
# The text of a prompt, and the tiles of its pictures.
PROMPTS = [
    ("Tell me about this: #", [[(2, 3)]]),
    ("# Ben put the silver key next to the well. Where is the silver key? #", [[(1, 1)], [(3, 2), (1, 2)]]),
]
# Files of different precisions work together, since embeddings and features are float32 in all of them.
MIXED = {"vision_encoder": "fp16", "embed_tokens": "fp16", "decoder_model_merged": "fp32"}


@pytest.fixture(scope="module")
def prompts(vl_checkpoint):
    """For each prompt the ids, the tiles and the gold."""
    model = gold_vl_model(vl_checkpoint)
    found = []
    for i, (text, tiles) in enumerate(PROMPTS):
        shown = pictures([tile for picture in tiles for tile in picture], model.config, seed=i)
        ids = row(text, tiles)
        found.append((ids, shown, gold_vl_tokens(model, ids, shown, NEW)))
    return found


@pytest.fixture(scope="module")
def answers(vl_hub_folder, prompts, tmp_path_factory):
    """The tokens for each precision and prompt, and what the library's processor makes of pictures of three sizes."""
    folder = shutil.copytree(vl_hub_folder, tmp_path_factory.mktemp("node") / "vl")
    # The library stops at this token, and the gold does not.
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": None}))
    cases = {}
    for i, (ids, shown, _) in enumerate(prompts):
        values = {
            name: {
                "type": "float32" if name == "pixel_values" else "int64",
                "data": x.flatten().tolist(),
                "dims": list(x.shape),
            }
            for name, x in shown.items()
        }
        for dtype in (*DEFAULT, MIXED):
            asked = case("pictures", dtype=dtype, ids=ids.tolist(), values=values, max_new_tokens=NEW)
            cases["mixed" if dtype is MIXED else dtype, i] = asked
    for size in ((24, 32), (10, 12), (100, 48)):
        path = write_png(folder.parent / f"{size}.png", drawn(*size))
        cases[size] = case("process", path=str(path))
    return ask(folder, cases)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "mixed"])
def test_tokens_are_transformers(dtype, answers, prompts):
    assert [answers[dtype, i] for i in range(len(prompts))] == [gold for *_, gold in prompts]


@pytest.mark.parametrize("dtype", DEFAULT)
def test_tokens_are_ours_in_the_same_precision(dtype, answers, prompts, vl_hub_folder):
    file = PRECISIONS[dtype].named("decoder_model_merged")
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(vl_hub_folder, file_name=file)
    for i, (ids, shown, _) in enumerate(prompts):
        inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **shown}
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert answers[dtype, i] == out[0, len(ids) :].tolist()


def test_its_processor_has_the_arithmetic_of_transformers(answers):
    """A picture keeps its shape, though transformers saves a `do_resize` that it ignores itself.

    Resizing differs otherwise (docs/vision.md), so that values are compared where nothing is resized.
    """
    same = answers[24, 32]
    expected = processed(drawn(24, 32))
    count = expected["pixel_values"].shape[1]
    values = np.array(same["values"]).reshape(same["dims"])[:, :count]
    np.testing.assert_allclose(values, expected["pixel_values"], atol=1e-6)
    assert same["shapes"] == expected["spatial_shapes"].tolist() == [[6, 8]]
    assert answers[10, 12]["shapes"] == [[4, 6]]  # enlarged to min_image_tokens
    # Two columns and four rows of tiles of 32 x 32, and a thumbnail of at most max_image_tokens.
    assert answers[100, 48]["shapes"] == [[8, 8]] * 8 + [[10, 4]]


def test_the_example_of_the_card_answers(vl_hub_folder, tmp_path):
    (snippet,) = re.findall(r"```js\n(.*?)```", (vl_hub_folder / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / vl_hub_folder.name).symlink_to(vl_hub_folder)
    pixels = drawn()
    write_png(tmp_path / "picture.jpg", pixels)  # its content says what it is
    here = json.dumps(str(tmp_path))
    setup = f"env.allowRemoteModels = false; env.localModelPath = {here}; process.chdir({here});\n"
    script = f'import {{ env }} from "@huggingface/transformers";\n{setup}{snippet}'
    command = ["node", "--input-type=module", "-"]
    done = subprocess.run(command, input=script, cwd=WEB, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(vl_hub_folder)
    ids = asked("What is in this picture?", [pixels], tokenizer)
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(vl_hub_folder, file_name="decoder_model_merged_q4.onnx")
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **processed(pixels)}
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, len(ids) :].tolist()
    assert done.stdout.strip() == tokenizer.decode(up_to_end(tokens), skip_special_tokens=True)
