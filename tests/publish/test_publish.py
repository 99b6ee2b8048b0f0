"""`optimum-cli export lfm2`: the contents of the folder, and what a second run adds to it."""

from __future__ import annotations

import json
import re

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from checkpoints import gold_tokens, prompts
from optimum.onnxruntime import ORTModelForCausalLM
from publishing import TEXT, TRAINED, genai_weights, js_config, rows, run, story, tree

from optimum_lfm2.publish.precisions import DEFAULT, PRECISIONS


FILES = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "genai_config.json",
    "generation_config.json",
    "onnx/genai_decoder.onnx_graph",
    *(f"onnx/{PRECISIONS[name].file}{part}" for name in DEFAULT for part in ("", "_data")),
    "tokenizer.json",
    "tokenizer_config.json",
]


def test_the_files(hub_folder):
    written = set(tree(hub_folder)) - {"special_tokens_map.json"}  # only transformers 4 writes it
    assert sorted(written) == sorted(FILES)
    assert [path.name for path in hub_folder.parent.iterdir()] == ["lfm2"]
    assert "chat_template" in json.loads((hub_folder / "tokenizer_config.json").read_text())


def test_transformers_js_is_told_which_files_have_their_weights_beside_them(hub_folder):
    names = ["model.onnx", "model_fp16.onnx", "model_quantized.onnx", "model_q4.onnx", "model_q4f16.onnx"]
    assert js_config(hub_folder) == {"use_external_data_format": dict.fromkeys(names, True)}


@pytest.mark.parametrize("precision", DEFAULT)
def test_a_browser_can_run_it(hub_folder, precision):
    """The graph has only operators that browser builds have, no default for the logits, and the Hub's caches."""
    model = ir.load(hub_folder / "onnx" / PRECISIONS[precision].file)
    assert "GatherBlockQuantized" not in {node.op_type for node in model.graph}
    inputs = {value.name: value for value in model.graph.inputs}
    assert "num_logits_to_keep" in inputs
    assert "num_logits_to_keep" not in model.graph.initializers
    assert [str(axis) for axis in inputs["past_conv.0"].shape] == ["batch_size", "128", "3"]
    half = precision.endswith("16")
    assert inputs["past_conv.0"].dtype == (ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "vector"])
def test_num_logits_to_keep_is_a_scalar_or_a_vector(hub_folder, shape):
    session = onnxruntime.InferenceSession(hub_folder / "onnx" / "model.onnx")
    feeds = {"input_ids": story().numpy(), "attention_mask": np.ones_like(story().numpy())}
    for value in session.get_inputs()[2:-1]:
        sizes = [{"batch_size": 1, "past_sequence_length": 0}.get(axis, axis) for axis in value.shape]
        feeds[value.name] = np.zeros(sizes, np.float32)
    (every,) = session.run(["logits"], feeds | {"num_logits_to_keep": np.zeros(shape, np.int64)})
    (last,) = session.run(["logits"], feeds | {"num_logits_to_keep": np.ones(shape, np.int64)})
    assert every.shape[1] == story().shape[1]
    np.testing.assert_allclose(last, every[:, -1:], atol=1e-5)
    with pytest.raises(ValueError, match="num_logits_to_keep"):
        session.run(["logits"], feeds)


def test_a_model_with_experts(experts_folder, gold_model):
    """Each dtype has two files or more: validating the first file must not change the weights of the second."""
    model = ORTModelForCausalLM.from_pretrained(experts_folder, subfolder="onnx", file_name="model.onnx")
    (row,) = prompts([9])
    tokens = model.generate(row[None], max_new_tokens=32, do_sample=False)[0, 9:].tolist()
    assert tokens == gold_tokens(gold_model("moe"), row, 32)[: len(tokens)]
    assert len(tokens) > 16
    card = (experts_folder / "README.md").read_text()
    assert "each layer compared with that of transformers" in card
    assert '{ dtype: "q4f16" }' in card  # tests/interop/test_node.py shows why
    assert "It cannot run q8 or q4: " in card
    found = {precision: float(cells[4]) for precision, cells in rows(experts_folder).items()}
    assert 0 < found["fp32"] < 1e-5 < found["fp16"] < 0.02
    assert all(0 < found[precision] < 0.1 for precision in ("q8", "q4", "q4f16"))
    assert rows(experts_folder)["fp32"][-2:] == ["0.000000 ± 0.000000", "100.00%"]


@pytest.mark.once
def test_a_second_run_adds_and_leaves_the_others(hub_folder, tmp_path):
    out = tmp_path / "work" / "out"
    options = ["--model", TRAINED, out, "--precisions"]
    assert run(*options, "q4", *TEXT) == 0
    assert js_config(out) == {"use_external_data_format": {"model_q4.onnx": True}}
    config = json.loads((out / "config.json").read_text())
    config["transformers.js_config"]["dtype"] = "q4"  # a setting of the user
    (out / "config.json").write_text(json.dumps(config))
    (out / "notes.txt").write_text("mine")
    before = tree(out)

    assert run(*options, "fp32") == 0
    after = tree(out)
    new = {"README.md", "config.json", "onnx/model.onnx", "onnx/model.onnx_data"}
    assert {name for name in after if before.get(name) != after[name]} == new
    assert js_config(out) == {"dtype": "q4", "use_external_data_format": {"model.onnx": True, "model_q4.onnx": True}}
    cells = rows(out)
    assert list(cells) == ["fp32", "q4"]
    assert cells["q4"] == rows(hub_folder)["q4"]  # the first run measured it
    assert cells["fp32"][5:] != rows(hub_folder)["fp32"][5:]  # no run measured it
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.once
def test_a_file_that_a_user_removed_is_not_declared(small):
    for path in small.glob("onnx/model_q4*"):
        path.unlink()
    assert run("--model", TRAINED, small, "--precisions", "q8") == 0
    assert js_config(small) == {"use_external_data_format": {"model.onnx": True, "model_quantized.onnx": True}}
    assert list(rows(small)) == ["fp32", "q8"]
    assert genai_weights(small) == {"model_quantized.onnx_data"}


def test_help_teaches(cli_said):
    _, out, _ = cli_said("export", "lfm2", "--help")
    for name, precision in PRECISIONS.items():
        assert re.search(rf"OUT/onnx/{re.escape(precision.file)} +{name} ", out)
    assert "examples:" in out
    assert "og.Model" in out
