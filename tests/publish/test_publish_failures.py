"""Refusals and failures of `optimum-cli export lfm2`: each is one line, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from publishing import DEMO, TRAINED, answer, js_config, rows, run, tree
from safetensors.torch import load_file, save_file


pytestmark = pytest.mark.once


def overflowing(folder: Path) -> Path:
    """Make a checkpoint that computes the same in fp32, with a weight that fp16 cannot hold."""
    source = shutil.copytree(TRAINED, folder / "overflowing")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.3"
    tensors[f"{name}.ffn_norm.weight"] *= 1e6
    for part in ("w1", "w3"):
        tensors[f"{name}.feed_forward.{part}.weight"] /= 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_a_precision_that_fails_is_not_left_behind(tmp_path, capfd):
    out = tmp_path / "work" / "out"
    assert run("--model", overflowing(tmp_path), out, "--precisions", "q8", "fp16") == 1
    err = capfd.readouterr().err
    assert err.startswith("optimum-cli: error: fp16: model.layers.3.ffn_norm.weight")
    assert err.count("\n") == 1
    assert sorted(path.name for path in (out / "onnx").iterdir()) == [
        "genai_decoder.onnx_graph",
        "model_quantized.onnx",
        "model_quantized.onnx_data",
    ]
    assert js_config(out) == {"use_external_data_format": {"model_quantized.onnx": True}}
    assert list(rows(out)) == ["q8"]
    assert answer(out) == "3 plus 4 is 7."


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--atol", "0"], "q8: The file is wrong and was not kept"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", DEMO / "heldout.txt", "--length", "99999"], "Give more text"),
        (["--text", DEMO / "heldout.txt", "--length", "1"], "64 chunks of 1 tokens cannot be compared"),
        (["--text", DEMO / "heldout.txt", "--chunks", "1"], "1 chunks of 512 tokens cannot be compared"),
        (["--cache-names", "genai"], "by the convention hub"),
    ],
    ids=["wrong", "no text", "short text", "short chunks", "one chunk", "other names"],
)
def test_a_failed_run_leaves_the_folder_as_it_was(options, says, small, capfd):
    before = tree(small)
    capfd.readouterr()
    assert run("--model", TRAINED, small, "--precisions", "q8", *options) == 1
    err = capfd.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert tree(small) == before
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def _other_config(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-6}))
    return "norm_eps"


def _other_weights(source: Path) -> str:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.conv.in_proj.weight"][1] *= 1.5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return "other weights"


def _no_tokenizer(source: Path) -> str:
    for path in source.glob("tokenizer*"):
        path.unlink()
    return "no tokenizer"


def _no_head(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["Lfm2Model"]}))
    return "feature-extraction"


def _other_family(source: Path) -> str:
    (source / "config.json").write_text('{"model_type": "llama"}')
    return "llama"


def _config_that_transformers_5_refuses(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"initializer_range": 0}))
    return "initializer_range"


def test_a_published_file_that_is_no_graph(small, capfd):
    (small / "onnx" / "model_q4.onnx").write_bytes(b"no graph")
    before = tree(small)
    capfd.readouterr()
    assert run("--model", TRAINED, small, "--precisions", "q8") == 1
    err = capfd.readouterr().err
    assert "model_q4.onnx cannot be read" in err
    assert err.count("\n") == 1
    assert tree(small) == before


def test_settings_of_transformers_js_that_are_no_object(small):
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"transformers.js_config": 7}))
    assert run("--model", TRAINED, small, "--precisions", "q8") == 0
    assert len(js_config(small)["use_external_data_format"]) == 3


@pytest.mark.parametrize(
    "spoil",
    [_config_that_transformers_5_refuses, _other_config, _other_weights, _no_tokenizer, _no_head, _other_family],
)
def test_a_checkpoint_that_does_not_belong_here_is_refused(spoil, small, tmp_path, capfd):
    source = shutil.copytree(TRAINED, tmp_path / "source")
    says = spoil(source)
    before = tree(small)
    capfd.readouterr()
    assert run("--model", source, small, "--precisions", "q8") == 1
    err = capfd.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert tree(small) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--precisions", "q4", "int3"],
            "--precisions int3 is not known. Choose among fp32, fp16, q8, q4, q4s, q4f16.",
        ),
        (["--cache-names", "mine"], "--cache-names mine is not known. Choose among hub, genai."),
        (["--atol", "nan"], "--atol"),
        (["--repo-id", "a b/c/d"], "--repo-id a b/c/d is no id on the Hub. Give one such as YOU/YOUR-MODEL."),
    ],
)
def test_an_option_is_refused_before_any_work(options, says, tmp_path, capfd):
    assert run("--model", TRAINED, tmp_path / "out", *options) == 1
    assert says in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_and_another_layout_are_not_written_to(exported, tmp_path, capfd):
    source = shutil.copytree(TRAINED, tmp_path / "source")
    assert run("--model", source, source) == 1
    assert "holds a checkpoint" in capfd.readouterr().err
    assert run("--model", TRAINED, exported("trained")) == 1
    assert "has a model.onnx of optimum-cli export onnx" in capfd.readouterr().err
