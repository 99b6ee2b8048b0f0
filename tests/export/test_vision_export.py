"""The export of LFM2-VL: its files, its checks, and what it refuses."""

from __future__ import annotations

import copy
import json
import shutil

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from commands import assert_unharmed
from optimum.exporters.onnx import convert
from pictures import PROCESSOR, gold_vl_model, make_vl_checkpoint, pictures
from safetensors.torch import load_file, save_file

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration, compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.graph import siglip2
from optimum_lfm2.loading.tasks_manager import Lfm2TasksManager
from optimum_lfm2.vision_configs import VisionOnnxConfig


# tests/interop/test_node_vision.py shows why.
FOR_JAVASCRIPT = siglip2.PROCESSOR.defaults | PROCESSOR | {"do_resize": False}
PARTS = ["decoder_model_merged", "embed_tokens", "vision_encoder"]
# Each knob has a value that a mistake would not survive.
KNOBS = {
    "default": {},
    "no projector bias": {"projector_bias": False},
    "blocks of 3": {"downsample_factor": 3},
    "exact gelu": {"vision_config": {"hidden_act": "gelu"}},
    "tanh gelu": {"projector_hidden_act": "gelu_pytorch_tanh"},
    "one head": {"vision_config": {"num_attention_heads": 1, "layer_norm_eps": 0.1}},
    "grey": {"vision_config": {"num_channels": 1, "patch_size": 5}},
    "table of 7": {"vision_config": {"num_patches": 49}},
    "pooling head": {"vision_config": {"vision_use_head": True}},
    "no projector norm": {"projector_use_layernorm": False},
}


def vision_part(checkpoint, path, variant: str = "default", dtype: torch.dtype = torch.float32):
    """Export the vision encoder alone, and return its configuration and the model."""
    model = Lfm2TasksManager.get_model_from_task("image-text-to-text", str(checkpoint), torch_dtype=dtype)
    config = VisionOnnxConfig(model.config, float_dtype="fp16" if dtype == torch.float16 else "fp32")
    config.variant = variant
    convert.export(model, config, path)
    return config, model


@pytest.mark.parametrize("knob", KNOBS)
def test_the_vision_encoder_is_transformers(knob, tmp_path):
    if knob == "no projector norm" and not compat.TRANSFORMERS_5:
        pytest.skip("transformers 4.57 has no such switch")
    checkpoint = make_vl_checkpoint(tmp_path / "checkpoint", **copy.deepcopy(KNOBS[knob]))
    config, model = vision_part(checkpoint, tmp_path / "vision.onnx")
    assert config.validate(model, tmp_path / "vision.onnx")["image_features"] < 1e-4
    # And as a client sees it: several pictures of different sizes at once, against transformers' own forward.
    gold = gold_vl_model(checkpoint)
    shown = pictures([(1, 1), (5, 2), (1, 7), (3, 3)], gold.config)
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx")
    feeds = {name: values.numpy() for name, values in shown.items()}
    feeds["pixel_attention_mask"] = feeds["pixel_attention_mask"].astype("int64")
    (own,) = session.run(None, feeds)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(own), compat.picture_features(gold, shown), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["q4", "q8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_vision_is_quantised_to_8_bits_and_keeps_activations_in_float(variant, dtype, vl_checkpoint, tmp_path):
    path = tmp_path / "vision.onnx"
    config, model = vision_part(vl_checkpoint, path, variant, dtype)
    config.validate(model, path)
    graph = ir.load(path).graph
    layers = [node for node in graph if node.op_type == "MatMulNBits"]
    assert len(layers) == 1 + 3 * 6 + 2  # patches, six linear layers a block, the projector
    assert {node.attributes.get_int("bits") for node in layers} == {8}
    assert {node.attributes.get_int("block_size") for node in layers} == {128}
    assert not any("accuracy_level" in node.attributes for node in layers)
    assert {value.dtype for value in (graph.inputs[0], graph.outputs[0])} == {ir.DataType.FLOAT}


@pytest.mark.parametrize("broken", ["positions", "encoder_layer"])
def test_a_wrong_vision_encoder_is_refused(broken, vl_checkpoint, tmp_path, monkeypatch):
    original = getattr(siglip2, broken)
    monkeypatch.setattr(siglip2, broken, lambda *arguments: original(*arguments) * 1.01)
    config, model = vision_part(vl_checkpoint, tmp_path / "vision.onnx")
    with pytest.raises(Lfm2Error, match="image_features differs from transformers"):
        config.validate(model, tmp_path / "vision.onnx")


@pytest.mark.parametrize("options", [["--variant", "q4"], ["--dtype", "fp16", "--variant", "q4"], ["--dtype", "fp16"]])
def test_the_command_writes_a_folder_for_transformers_js(options, vl_checkpoint, tmp_path, cli):
    out = tmp_path / "out"
    assert cli("export", "onnx", "--model", vl_checkpoint, out, *options) == (0, "")
    graphs = {path.name for path in out.glob("onnx/*") if not path.name.endswith("_data")}
    assert graphs == {*(f"{part}.onnx" for part in PARTS), "genai_decoder.onnx_graph", "genai_embedding.onnx_graph"}
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["text_config"]["model_type"]) == ("lfm2_vl", "lfm2")
    declared = config["transformers.js_config"]["use_external_data_format"]
    assert declared == {f"{part}.onnx": True for part in PARTS}
    assert json.loads((out / "preprocessor_config.json").read_text()) == FOR_JAVASCRIPT
    assert (out / "tokenizer.json").is_file()
    graphs = {part: ir.load(out / "onnx" / f"{part}.onnx").graph for part in PARTS}
    between = [graphs["decoder_model_merged"].inputs[0], graphs["embed_tokens"].outputs[0]]
    assert {(value.name, value.dtype) for value in between} == {("inputs_embeds", ir.DataType.FLOAT)}
    assert ORTLfm2VlForConditionalGeneration.from_pretrained(out)


def test_settings_within_those_of_the_processor_are_written_beside_them_too(vl_checkpoint, tmp_path, cli):
    """Transformers 5 saves one file, and Transformers.js 4.3 reads the other."""
    source = shutil.copytree(vl_checkpoint, tmp_path / "source")
    (source / "preprocessor_config.json").unlink()
    own = {name: value for name, value in PROCESSOR.items() if name != "processor_class"}
    whole = {"image_processor": own, "processor_class": "Lfm2VlProcessor"}
    (source / "processor_config.json").write_text(json.dumps(whole))
    assert cli("export", "onnx", "--model", source, tmp_path / "out", "--variant", "q8") == (0, "")
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == FOR_JAVASCRIPT
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text()) == whole


@pytest.mark.parametrize("level", ["", "vision_model."], ids=["transformers 5", "transformers 4"])
def test_files_of_both_releases_are_read(level, vl_checkpoint, tmp_path):
    """Transformers 4 stores the tower one level deeper. transformers 4.57 reads no files of 5; the export does."""
    source = shutil.copytree(vl_checkpoint, tmp_path / "source")
    tensors = {
        name.replace("vision_tower.vision_model.", "vision_tower.").replace("vision_tower.", f"vision_tower.{level}"): x
        for name, x in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config, model = vision_part(source, tmp_path / "vision.onnx")
    config.validate(model, tmp_path / "vision.onnx")
    shown = pictures([(2, 2)], model.config)
    (own,) = onnxruntime.InferenceSession(tmp_path / "vision.onnx").run(
        None,
        {name: values.to(torch.int64 if "mask" in name else values.dtype).numpy() for name, values in shown.items()},
    )
    with torch.no_grad():
        gold = compat.picture_features(gold_vl_model(vl_checkpoint), shown)
    torch.testing.assert_close(torch.from_numpy(own), gold, rtol=1e-4, atol=1e-4)


def changed(source, folder, *changes):
    """Copy a checkpoint, with other fields in config.json: pairs of a path of keys and a value."""
    path = shutil.copytree(source, folder)
    config = json.loads((path / "config.json").read_text())
    for keys, value in changes:
        *outer, last = keys.split(".")
        place = config
        for key in outer:
            place = place[key]
        place[last] = value
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        ("vision_config.hidden_act", "relu", "hidden_act in the vision_config"),
        ("vision_config.model_type", "clip_vision_model", "siglip2_vision_model"),
        ("vision_config.num_patches", 15, "no square"),
        ("vision_config.num_attention_heads", 5, "does not divide"),
        ("projector_hidden_act", "silu", "projector_hidden_act in config.json"),
        ("text_config.model_type", "llama", "model_type in the text_config"),
        ("text_config.layer_types", ["conv", "mamba"] + ["conv"] * 5, "layer_types in the text_config"),
        ("text_config.vocab_size", 2000, "embed_tokens"),
        ("image_token_id", -3, "image_token_id in config.json"),
    ],
)
def test_what_cannot_be_exported_is_one_line(keys, value, said, vl_checkpoint, tmp_path, out, cli):
    source = changed(vl_checkpoint, tmp_path / "source", (keys, value))
    code, err = cli("export", "onnx", "--model", source, out)
    assert code == 1
    assert said in err
    assert err.count("\n") == 1
    assert_unharmed(out)


def test_wrong_options_are_one_line(vl_checkpoint, out, cli):
    for options, said in [(["--monolith"], "three"), (["--task", "text-generation"], "image-text-to-text")]:
        code, err = cli("export", "onnx", "--model", vl_checkpoint, out, *options)
        assert (code, err.count("\n")) == (1, 1)
        assert said in err
    assert_unharmed(out)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (None, "has no preprocessor_config.json"),
        ("{", "preprocessor_config.json"),
        (json.dumps(PROCESSOR | {"encoder_patch_size": 16}), "is 16, and the model's config.json says 4"),
        (json.dumps(PROCESSOR | {"downsample_factor": 3}), "downsample_factor in preprocessor_config.json is 3"),
        (json.dumps(PROCESSOR | {"max_image_tokens": "all"}), "max_image_tokens in preprocessor_config.json is all"),
    ],
    ids=["none", "no JSON", "other patches", "other factor", "no number"],
)
def test_a_processor_that_does_not_fit_is_one_line(settings, said, vl_checkpoint, tmp_path, out, cli):
    source = shutil.copytree(vl_checkpoint, tmp_path / "source")
    (source / "preprocessor_config.json").unlink()
    if settings is not None:
        (source / "preprocessor_config.json").write_text(settings)
    for command, folder in ((["onnx"], out), (["lfm2"], tmp_path / "hub")):
        code, err = cli("export", *command, "--model", source, folder)
        assert (code, err.count("\n")) == (1, 1)
        assert said in err
    assert_unharmed(out)
    assert not (tmp_path / "hub").exists()


def test_pictures_of_a_filter_that_genai_lacks(vl_checkpoint, tmp_path, cli):
    """They are no reason to refuse an export, and other runtimes run it."""
    source = shutil.copytree(vl_checkpoint, tmp_path / "source")
    (source / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"resample": 5, "image_mean": None}))
    assert cli("export", "onnx", "--model", source, tmp_path / "out") == (0, "")
    assert not list(tmp_path.glob("out/**/genai*"))


def test_both_spellings_of_the_type_are_exported(vl_checkpoint, tmp_path):
    for spelling in ("lfm2_vl", "lfm2-vl"):
        source = changed(vl_checkpoint, tmp_path / spelling, ("model_type", spelling))
        assert Lfm2TasksManager.infer_task_from_model(source, library_name="transformers") == "image-text-to-text"
        config, model = vision_part(source, tmp_path / f"{spelling}.onnx")
        config.validate(model, tmp_path / f"{spelling}.onnx")
