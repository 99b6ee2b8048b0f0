"""The chat page takes pictures, and answers about them as transformers does."""

from __future__ import annotations

import base64
import shutil

import pytest
import torch
import torch.nn.functional as F
from clients import case, up_to_end
from pictures import PROCESSOR, asked, drawn, gold_vl_model, gold_vl_tokens, processed, write_png
from test_node import ask
from test_web import browse, browser, installed, run_serve, serve
from transformers import AutoTokenizer

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration
from optimum_lfm2.graph.siglip2 import TOWER


pytestmark = pytest.mark.once

NEW = 48
PICTURE = TOWER.media[0].arguments
SIDE = PROCESSOR["encoder_patch_size"]
# Height and width. The first two need no resizing: their sides are multiples of 8, and they have 4 to 16 tokens.
SIZES = {"wide": (16, 48), "tall": (32, 24), "small": (13, 11), "large": (45, 37), "tiled": (70, 90)}
RESIZED = {"small": (24, 16), "large": (32, 24)}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """`picture(name)` gives a file of a picture, as `browse.mjs` takes it."""
    folder = tmp_path_factory.mktemp("drawn")

    def picture(name):
        path = write_png(folder / f"{name}.png", drawn(*SIZES[name]))
        return {"name": path.name, "base64": base64.b64encode(path.read_bytes()).decode()}

    return picture


@pytest.fixture(scope="module")
def visit(vl_folder, picture, tmp_path_factory):
    def turn(content, *names):
        return {"role": "user", "content": content, "pictures": [picture(name) for name in names]}

    broken = picture("wide")
    broken = {"name": "notes.png", "base64": broken["base64"][:40]}
    return browse(
        vl_folder,
        tmp_path_factory.mktemp("web"),
        chat=[
            {"text": "Tell me about this.", "pictures": [picture("wide")], "how": "file"},
            {"text": "And these?", "pictures": [picture("tall"), picture("small")], "how": "paste"},
            {"text": "Thank you."},
        ],
        prompts=[
            *([turn("Tell me about this.", name)] for name in SIZES),
            [turn("What is it?", "wide"), {"role": "assistant", "content": "A key."}, turn("And this?", "tall")],
            [{"role": "user", "content": "Tell me a story."}],
        ],
        refused={"pictures": [broken], "how": "drop"},
        failing={"text": "What is <image>?", "pictures": [picture("tall")], "how": "file"},
    )


@pytest.fixture(scope="module")
def inputs(visit):
    """What the page gave to the model for each prompt, as tensors. The first prompts are those of `SIZES`."""
    dtypes = {"float32": torch.float32, "int64": torch.int64}
    return [
        {
            name: torch.tensor(value["data"], dtype=dtypes[value["type"]]).reshape(value["dims"])
            for name, value in given.items()
        }
        for given in visit["inputs"]
    ]


@pytest.fixture(scope="module")
def shown(inputs):
    """What the page gave to the model for each picture of `SIZES`."""
    return dict(zip(SIZES, inputs, strict=False))


@installed
@browser
def test_tokens_in_the_browser_are_those_of_transformers(visit, inputs, vl_checkpoint):
    """The reference gets the ids and pixel values of the page."""
    model = gold_vl_model(vl_checkpoint)
    gold = []
    for given in inputs:
        pixels = {name: given[name] for name in PICTURE if name in given}
        gold.append(gold_vl_tokens(model, given["input_ids"][0], pixels or None, NEW))
    assert visit["ids"] == [up_to_end(tokens) for tokens in gold]
    assert len({tuple(tokens[:8]) for tokens in gold}) > 3, "the pictures make no difference"


@installed
@browser
@pytest.mark.parametrize("name", ["wide", "tall"])
def test_the_ids_are_those_of_transformers_processor(shown, vl_folder, name):
    ids = asked("Tell me about this.", [drawn(*SIZES[name])], AutoTokenizer.from_pretrained(vl_folder))
    assert shown[name]["input_ids"][0].tolist() == ids.tolist()


@installed
@browser
def test_the_model_gets_the_pictures_of_every_turn(inputs, shown):
    both = inputs[len(SIZES)]
    for key in PICTURE:
        assert torch.equal(both[key], torch.cat([shown["wide"][key], shown["tall"][key]]))


@installed
@browser
def test_tokens_in_python_and_in_node_are_the_same(visit, inputs, vl_folder):
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(vl_folder)
    cases = {}
    for i, given in enumerate(inputs):
        ids = given["input_ids"]
        out = model.generate(**given, max_new_tokens=NEW, do_sample=False)
        assert out[0, ids.shape[1] :].tolist() == visit["ids"][i]
        values = {name: value for name, value in visit["inputs"][i].items() if name in PICTURE}
        cases[i] = case("pictures", dtype="fp32", ids=ids[0].tolist(), values=values, max_new_tokens=NEW)
    assert list(ask(vl_folder, cases).values()) == visit["ids"]


@installed
@browser
def test_a_chat_has_pictures_in_several_turns(visit, vl_folder):
    assert visit["takesPictures"]
    assert visit["shown"] == [1, 2, 0]
    asked = [[len(turn.get("pictures", [])) for turn in turns] for turns in visit["asked"]]
    assert asked[:3] == [[1], [1, 0, 2], [1, 0, 2, 0, 0]]
    first = AutoTokenizer.from_pretrained(vl_folder).decode(visit["ids"][0], skip_special_tokens=True)
    assert visit["answers"][0].startswith(first)
    assert visit["errors"] == []
    assert visit["elsewhere"] == []
    assert visit["phoneWidth"] == 360


@installed
@browser
def test_what_is_no_picture_is_told_in_one_line(visit):
    assert visit["refused"] == "notes.png cannot be read as a picture. Choose a PNG, JPEG or WebP file."


@installed
@browser
def test_a_message_that_fails_is_given_back_with_its_pictures(visit):
    alert = "Leave <image> out: it stands for a picture."
    assert visit["failing"] == {"alert": alert, "message": "What is <image>?", "pictures": 1, "turns": 6}


@installed
@browser
@pytest.mark.parametrize("name", ["wide", "tall"])
def test_a_picture_that_needs_no_resizing_is_read_as_transformers_reads_it(shown, name):
    own = processed(drawn(*SIZES[name]))
    count = own["pixel_values"].shape[1]
    assert torch.equal(shown[name]["spatial_shapes"], own["spatial_shapes"])
    assert int(shown[name]["pixel_attention_mask"].sum()) == count
    torch.testing.assert_close(shown[name]["pixel_values"][:, :count], own["pixel_values"], atol=1e-6, rtol=0)


@installed
@browser
@pytest.mark.parametrize("name", RESIZED)
def test_a_resized_picture_is_bilinear_without_antialias(shown, name):
    """docs/vision.md says so of Transformers.js 4.3.2. transformers smooths a picture before it shrinks it."""
    pixels = torch.from_numpy(drawn(*SIZES[name]) / 127.5 - 1).float().permute(2, 0, 1)[None]

    def difference(antialias):
        resized = F.interpolate(pixels, RESIZED[name], mode="bilinear", antialias=antialias)[0].permute(1, 2, 0)
        own = processed((resized.numpy() + 1) * 127.5)["pixel_values"]
        return (shown[name]["pixel_values"][:, : own.shape[1]] - own).abs().max()

    assert [n * SIDE for n in shown[name]["spatial_shapes"][0].tolist()] == list(RESIZED[name])
    assert difference(antialias=False) < 1e-4
    assert (difference(antialias=True) > 0.1) == (name == "large")


@installed
def test_a_missing_processor_is_said_in_one_line(vl_folder, tmp_path):
    name = "preprocessor_config.json"
    done = run_serve(shutil.copytree(vl_folder, tmp_path / "export", ignore=shutil.ignore_patterns(name)))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert name in done.stderr


@installed
def test_files_of_an_older_export_of_text_are_not_served(vl_folder, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    for path in vl_folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "model.onnx").touch()
    assert serve.Model(folder).root("onnx/vision_encoder.onnx") == (folder, "onnx/vision_encoder.onnx")
