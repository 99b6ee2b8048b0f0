"""LFM3-VL: its tower, the tests of `test_vision_modeling.py` over it, and videos. The gold is transformers."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torchvision_python
from lfm3_pictures import IMAGE, VIDEO, as_videos, gold_lfm3_vl, make_lfm3_vl, row, shown
from optimum.exporters.onnx import convert, main_export
from optimum.onnxruntime import ORTModelForCausalLM
from pictures import gold_vl_tokens
from publishing import run
from safetensors.torch import load_file, save_file
from test_vision_modeling import (  # noqa: F401  tests, which run here over the fixtures below
    NEW,
    batch,
    new_tokens,
    test_a_streamer_gets_the_tokens_as_they_come,
    test_beams_are_transformers,
    test_beams_of_a_batch_are_those_of_each_row_alone,
    test_rows_of_a_batch_get_the_tokens_that_they_get_alone,
    test_sampling_is_transformers,
    test_text_alone_has_candidates_from_the_prompt,
)
from transformers import AutoProcessor, AutoTokenizer

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration, ORTLfm3VlForConditionalGeneration, compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.graph import lfm3_frames, lfm3_vision
from optimum_lfm2.loading.tasks_manager import Lfm2TasksManager
from optimum_lfm2.vision_configs import VisionOnnxConfig


pytestmark = pytest.mark.skipif("lfm3_vl" in compat.STAND_INS, reason="this transformers has no lfm3_vl")
GRIDS = [(1, 2, 2), (1, 10, 2), (3, 4, 6), (1, 2, 14), (1, 6, 6)]  # the third is a video
# Several knobs a checkpoint, each with a value that a mistake would not survive.
KNOBS = {
    "no sharing, blocks of 3": {
        "vision_config": {
            "num_key_value_heads": 4,
            "spatial_merge_size": 3,
            "conv_kernel_size": 5,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 50.0},
            "norm_eps": 0.1,
        },
        "projector_bias": False,
    },
    "one frame, grey": {
        "vision_config": {
            "num_key_value_heads": 1,
            "temporal_patch_size": 1,
            "in_channels": 1,
            "patch_size": 5,
            "spatial_merge_size": 1,
            "conv_kernel_size": 1,
            "layer_types": ["full_attention"] * 2 + ["conv"] + ["full_attention"] * 2,
        },
        "projector_hidden_act": "gelu_pytorch_tanh",
    },
}
# The text of each row, and the grids of what it shows: `#` is a picture and `@` a video.
ROWS = [
    ("Tell me about this: #", [(1, 4, 6)]),
    ("What is 3 plus 4?", []),
    ("# Ben put the silver key next to the well. @ Where is the silver key? #", [(1, 2, 2), (2, 4, 2), (1, 6, 4)]),
    ("@ What comes after Tuesday?", [(3, 4, 4)]),
]


@pytest.fixture(scope="module")
def source(made_once) -> Path:
    return made_once("lfm3-vl-checkpoint", lambda folder: make_lfm3_vl(folder / "vl")) / "vl"


@pytest.fixture(scope="module")
def folder(source, made_once) -> Path:
    """Its export, validated. Never write to it."""
    return made_once("lfm3-vl", lambda path: main_export(str(source), path / "export")) / "export"


@pytest.fixture(scope="module")
def model(folder):
    return ORTLfm3VlForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def vl_gold(source):
    return gold_lfm3_vl(source)


def seen(text: str, grids: list, config, seed: int) -> dict[str, torch.Tensor]:
    """What a text shows, as the processor gives it: pictures and videos, each in order."""
    marks = re.findall("[#@]", text)
    found = {}
    for mark, own, name in (("#", shown, 0), ("@", lambda *given: as_videos(shown(*given)), 50)):
        if of_mark := [grid for kind, grid in zip(marks, grids, strict=True) if kind == mark]:
            found |= own(of_mark, config, seed + name)
    return found


@pytest.fixture(scope="module")
def rows(vl_gold):
    """For each row its ids, what it shows (None for nothing) and the gold."""
    found = []
    for i, (text, grids) in enumerate(ROWS):
        ids, given = row(text, grids), seen(text, grids, vl_gold.config, i) or None
        found.append((ids, given, gold_vl_tokens(vl_gold, ids, given, NEW)))
    return found


def vision_part(checkpoint: Path, path: Path, variant: str = "default", dtype: torch.dtype = torch.float32):
    """Export the vision encoder alone, and return its configuration and the model."""
    model = Lfm2TasksManager.get_model_from_task("image-text-to-text", str(checkpoint), torch_dtype=dtype)
    config = VisionOnnxConfig(model.config, float_dtype="fp16" if dtype == torch.float16 else "fp32")
    config.variant = variant
    convert.export(model, config, path)
    return config, model


def assert_is_gold(file: Path, gold, grids: list) -> None:
    """One call of the graph, and transformers on all of it."""
    pictures = shown(grids, gold.config)
    (own,) = onnxruntime.InferenceSession(file).run(None, {name: x.numpy() for name, x in pictures.items()})
    with torch.no_grad():
        features = compat.picture_features(gold, pictures)
    torch.testing.assert_close(torch.from_numpy(own), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "grids", [GRIDS, GRIDS[::-1], [(1, 8, 8)], [(4, 2, 4), (2, 6, 2)], [(2, 4, 6), (1, 6, 4), (1, 2, 12)]], ids=str
)
def test_the_vision_encoder_is_transformers(grids, folder, vl_gold):
    """Pictures of several sizes and videos in one call. Frames of the last one have as many patches."""
    assert_is_gold(folder / "onnx" / "vision_encoder.onnx", vl_gold, grids)


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_of_the_tower(knob, tmp_path):
    checkpoint = make_lfm3_vl(tmp_path / "checkpoint", **copy.deepcopy(KNOBS[knob]))
    config, model = vision_part(checkpoint, tmp_path / "vision.onnx")
    assert config.validate(model, tmp_path / "vision.onnx")["image_features"] < 1e-5
    assert_is_gold(tmp_path / "vision.onnx", gold_lfm3_vl(checkpoint), [(1, 6, 12), (2, 6, 6), (1, 12, 6)])


def test_the_tower_of_a_quantised_file_has_8_bits(source, tmp_path):
    config, model = vision_part(source, tmp_path / "vision.onnx", "q4", torch.float16)
    config.validate(model, tmp_path / "vision.onnx")
    layers = [node for node in ir.load(tmp_path / "vision.onnx").graph if node.op_type == "MatMulNBits"]
    assert len(layers) == 1 + 5 * (2 + 3) + 2  # patches, a mixer's two and a feed-forward's three, the projector
    assert {node.attributes.get_int("bits") for node in layers} == {8}


@pytest.mark.parametrize("broken", ["gated_conv", "row_and_column"])
def test_a_wrong_vision_encoder_is_refused(broken, source, tmp_path, monkeypatch):
    module = lfm3_vision if broken == "gated_conv" else lfm3_frames
    original = getattr(module, broken)

    def wrong(*arguments):
        result = original(*arguments)
        return result[::-1] if isinstance(result, tuple) else result * 1.01

    monkeypatch.setattr(module, broken, wrong)
    config, model = vision_part(source, tmp_path / "vision.onnx")
    with pytest.raises(Lfm2Error, match="image_features differs from transformers"):
        config.validate(model, tmp_path / "vision.onnx")


def test_the_text_depends_on_what_is_shown(vl_gold, rows):
    """Also on a video, and on the order of its frames."""
    for i in (0, 3):
        ids, given, gold = rows[i]
        turned = {name: x.flip(0) if name.startswith("pixel") else x for name, x in given.items()}
        assert gold_vl_tokens(vl_gold, ids, turned, NEW) != gold


def test_logits_and_features_are_transformers(model, vl_gold, rows):
    inputs = batch(rows[2:3], "left")
    with torch.no_grad():
        gold = vl_gold(**inputs).logits
        pictures, videos = vl_gold.get_image_features, vl_gold.get_video_features
        images = torch.cat(pictures(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output)
        films = torch.cat(videos(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output)
    torch.testing.assert_close(model(**inputs).logits, gold, rtol=1e-4, atol=1e-3)
    own = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    torch.testing.assert_close(own, images, rtol=1e-4, atol=1e-5)
    own = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    torch.testing.assert_close(own, films, rtol=1e-4, atol=1e-5)


def test_a_long_prompt_runs_in_chunks_with_its_videos(model, vl_gold):
    grids = [(6, 8, 12), (1, 16, 24)]
    text = "@ and # Tell me a story."
    ids, given = row(text, grids), seen(text, grids, vl_gold.config, 3)
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **given}
    gold = gold_vl_tokens(vl_gold, ids, given, NEW)
    assert new_tokens(model, inputs) == [gold]
    assert new_tokens(model, inputs, prefill_chunk_size=7) == [gold]


@pytest.mark.parametrize("whole", [True, False], ids=["all that was shown", "the new video"])
@pytest.mark.parametrize("back", [0, 5, 24], ids="crop({})".format)
def test_a_chat_goes_on_with_a_video(whole, back, model, vl_gold, rows):
    """From its whole cache, from one that was cropped into the answer, and from one cropped before the picture."""
    ids, given, _ = rows[0]
    cache = model._graph.new_cache(1)
    cache.activate_past_recording()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    said = model.generate(**batch(rows[:1], "left"), **options, **{compat.CACHE: cache}).sequences[0]
    kept = said
    if back:
        cache.crop(-back)
        kept = said[: cache.get_seq_length()]
        assert bool((kept == IMAGE).any()) == (back == 5)
    film = as_videos(shown([(2, 4, 4)], vl_gold.config, seed=9))
    ids = torch.cat([kept, row("And this? @", [(2, 4, 4)])])
    old = given if bool((kept == IMAGE).any()) else {}
    gold = gold_vl_tokens(vl_gold, ids, {**old, **film}, NEW)
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **(old if whole else {}), **film}
    assert new_tokens(model, inputs, **{compat.CACHE: cache}) == [gold]


def test_a_saved_model_loads_again(model, rows, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "lfm3_vl"
    again = ORTLfm3VlForConditionalGeneration.from_pretrained(tmp_path)
    assert new_tokens(again, batch(rows[2:3], "left"), max_new_tokens=4)[0] == rows[2][2][:4]


def test_what_does_not_fit_is_one_line(model, rows):
    inputs = batch(rows[2:3], "left")
    places = torch.cat([inputs["input_ids"], torch.tensor([[VIDEO]])], 1)
    two = inputs | {"input_ids": places, "attention_mask": torch.ones_like(places)}
    wrong = {
        "has 5 video tokens, and the videos fill 4": two,
        "has video tokens, and there are no videos": {n: x for n, x in inputs.items() if "video" not in n},
        "has picture tokens, and there are no pictures": {
            name: x for name, x in inputs.items() if name not in ("pixel_values", "image_grid_thw")
        },
        "video_grid_thw is missing": {name: x for name, x in inputs.items() if name != "video_grid_thw"},
        r"give \(patches, 96\) and \(pictures, 3\)": inputs | {"pixel_values": inputs["pixel_values"][:, 1:]},
        "asks for 24 patches, and pixel_values has 28": inputs | {"image_grid_thw": torch.tensor([[1, 4, 6]])},
        "in multiples of 2": inputs | {"image_grid_thw": torch.tensor([[1, 4, 7]])},
        "1 or more pairs of frames": inputs | {"image_grid_thw": torch.tensor([[0, 4, 6]])},
        "has to be float": inputs | {"pixel_values": inputs["pixel_values"].to(torch.uint8)},
        "does not take pictures yet": inputs | {"prompt_lookup_num_tokens": 4},
    }
    for said, given in wrong.items():
        with pytest.raises(Lfm2Error, match=said) as error:
            model.generate(**given, max_new_tokens=2)
        assert "\n" not in str(error.value)


def test_classes_that_do_not_load_it_are_one_line(folder, vl_folder):
    for load, where, said in [
        (ORTLfm2VlForConditionalGeneration, folder, "Load it with optimum_lfm2.ORTLfm3VlForConditionalGeneration"),
        (ORTModelForCausalLM, folder, "Load it with optimum_lfm2.ORTLfm3VlForConditionalGeneration"),
        (ORTLfm3VlForConditionalGeneration, vl_folder, "Load it with optimum_lfm2.ORTLfm2VlForConditionalGeneration"),
    ]:
        with pytest.raises(Lfm2Error, match=said) as error:
            load.from_pretrained(where)
        assert "\n" not in str(error.value)


def test_names_as_published_and_as_transformers_has_them(source, folder, tmp_path):
    """Files call some parts otherwise than the modules of transformers: both are read."""
    weights = load_file(source / "model.safetensors")
    spelled = {".patchifier.": ".patch_embed.", ".q_layernorm.": ".q_norm.", ".k_layernorm.": ".k_norm."}
    renamed = {}
    for name, value in weights.items():
        for old, new in spelled.items():
            name = name.replace(old, new)
        renamed[name] = value
    assert len(weights.keys() - renamed.keys()) == 1 + 2 * 2
    other = shutil.copytree(source, tmp_path / "other")
    save_file(renamed, other / "model.safetensors", {"format": "pt"})
    vision_part(other, tmp_path / "vision_encoder.onnx")
    data = "vision_encoder.onnx_data"
    assert (tmp_path / data).read_bytes() == (folder / "onnx" / data).read_bytes()


def test_a_checkpoint_as_published(source, folder, tmp_path):
    """With the vendor's code in `auto_map`, and the text's partial rotation under the name "default"."""
    other = shutil.copytree(source, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "LiquidAI/LFM3-VL-2B--configuration_lfm3_vl.Lfm3VlConfig"}
    config["text_config"]["rope_parameters"]["full_attention"]["rope_type"] = "default"
    (other / "config.json").write_text(json.dumps(config))
    main_export(str(other), tmp_path / "out", do_validation=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"]["rope_parameters"]["full_attention"]["rope_type"] == "proportional"
    assert "auto_map" not in written
    for file in (path.name for path in folder.glob("onnx/*")):
        assert (tmp_path / "out" / "onnx" / file).read_bytes() == (folder / "onnx" / file).read_bytes(), file


def test_the_folder_has_every_file_of_the_processor(source, folder):
    assert not list(folder.glob("**/genai*"))  # onnxruntime-genai 0.18 has no such model
    own = json.loads((source / "preprocessor_config.json").read_text())
    of_javascript = {"image_processor_type": "Lfm3VlImageProcessor"}  # tests/interop/test_node_lfm3_vl.py shows why
    written = json.loads((folder / "preprocessor_config.json").read_text())
    assert written == lfm3_vision.PROCESSOR.defaults | own | of_javascript
    assert json.loads((folder / "processor_config.json").read_text())["image_processor"] == own
    name = "video_preprocessor_config.json"
    assert json.loads((folder / name).read_text()) == json.loads((source / name).read_text())


@pytest.mark.skipif(not torchvision_python.is_installed(), reason="no torchvision")
def test_transformers_own_processor_in_a_pipeline_the_chat_and_the_server(folder, model, vl_gold, tmp_path):
    """Of files, two pictures and a video; the video beside a picture in one text."""
    serves = ["serve"] if all(importlib.util.find_spec(name) for name in ("fastapi", "openai")) else []
    support = Path(torchvision_python.__file__).parent
    command = [sys.executable, support / "torchvision_python.py", support / "lfm3_child.py", folder, *serves]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (support.parents[1], support))), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    inputs = torch.load(tmp_path / "inputs.pt")
    assert inputs["pictures"]["image_grid_thw"].tolist() == [[1, 4, 12], [1, 18, 2]]
    assert inputs["video"]["video_grid_thw"].tolist() == [[3, 6, 8]]
    golds = {}
    for name, given in inputs.items():
        ids, mask = given.pop("input_ids"), given.pop("attention_mask")
        golds[name] = gold_vl_tokens(vl_gold, ids[0], given, 12)
        assert new_tokens(model, {"input_ids": ids, "attention_mask": mask, **given}, max_new_tokens=12) == [
            golds[name]
        ]
    said = json.loads((tmp_path / "said.json").read_text())
    gold = AutoTokenizer.from_pretrained(folder).decode(golds["one"], skip_special_tokens=True)
    assert said["pipeline"] == gold
    assert said["chat"] == {"out": f"{gold}\n", "err": ""}
    assert not serves or said["serve"] == gold


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        ("vision_config.conv_kernel_size", 4, "it has to be odd"),
        ("vision_config.num_attention_heads", 5, "multiple of 4"),
        ("vision_config.layer_types", ["conv", "mamba"] + ["conv"] * 3, "layer_types in the vision_config"),
        ("vision_config.model_type", "siglip2_vision_model", "lfm3_vl_vision"),
        ("text_config.model_type", "llama", "model_type in the text_config"),
        ("text_config.sliding_window", 0, "sliding_window in the text_config"),
        ("video_token_id", -3, "video_token_id in config.json"),
    ],
)
def test_what_cannot_be_exported_is_one_line(keys, value, said, source, tmp_path, out, cli):
    other = shutil.copytree(source, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((other / "config.json").read_text())
    *outer, last = keys.split(".")
    (config[outer[0]] if outer else config)[last] = value
    (other / "config.json").write_text(json.dumps(config))
    code, err = cli("export", "onnx", "--model", other, out)
    assert (code, err.count("\n")) == (1, 1)
    assert said in err


def test_the_folder_for_the_hub_and_its_card(source, rows, tmp_path, monkeypatch, capsys):
    """Its examples run, with the inputs of a row in the place of transformers' processor."""
    assert run("--model", source, tmp_path / "hub", "--precisions", "q4", "--base-model", "me/vl") == 0
    assert "ORTLfm3VlForConditionalGeneration.from_pretrained(" in capsys.readouterr().out
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "```js" in card
    assert "onnxruntime-genai 0.18 has no lfm3_vl, and does not run these files." in card
    assert card.count("genai") == 1
    assert (tmp_path / "hub" / "video_preprocessor_config.json").is_file()
    given = batch(rows[:1], "left")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hub")

    class Processor:
        decode = tokenizer.decode

        def apply_chat_template(self, chat, return_tensors, **_):
            return given if return_tensors == "pt" else {name: x.numpy() for name, x in given.items()}

    processor = Processor()
    processor.tokenizer = tokenizer
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name: processor)
    monkeypatch.chdir(tmp_path)
    said = []
    for snippet in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        exec(compile(snippet, "README.md", "exec"), {})
        said.append(capsys.readouterr().out.strip())
    assert len(said) == 2
    own = ORTLfm3VlForConditionalGeneration.from_pretrained(tmp_path / "hub")
    tokens = own.generate(**given, max_new_tokens=64, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert said == [tokenizer.decode(tokens, skip_special_tokens=True).strip()] * 2
