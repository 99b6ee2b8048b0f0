"""Loading an exported folder: which file, which settings, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
from checkpoints import HYBRID, gold_tokens, prompts
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import GenerationConfig

from optimum_lfm2 import ORTLfm2ForCausalLM
from optimum_lfm2.errors import Lfm2Error


NEW = 32
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def gold(gold_model):
    """A prompt of nine tokens, and transformers' greedy tokens after it."""
    (prompt,) = prompts([9])
    return prompt, gold_tokens(gold_model("hybrid"), prompt, NEW)


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of an export."""
    for file in exported("hybrid").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_export_on_load(checkpoint, gold):
    model = ORTModelForCausalLM.from_pretrained(checkpoint("hybrid"), export=True)
    assert isinstance(model, ORTLfm2ForCausalLM)
    prompt, tokens = gold
    assert model.generate(prompt[None], **GREEDY)[0, 9:].tolist() == tokens


def test_save_and_load_again(exported, gold, tmp_path):
    prompt, tokens = gold
    model = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "generation_config.json").unlink()
    again = ORTModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.generation_config.eos_token_id == 7, "where there are no settings, config.json has some"
    assert again.generate(prompt[None], **GREEDY)[0, 9:].tolist() == tokens


def test_file_name_and_subfolder(exported, gold, tmp_path):
    prompt, tokens = gold
    source = exported("hybrid")
    (tmp_path / "onnx").mkdir()
    for file in source.iterdir():
        target = tmp_path / "onnx" if file.name.startswith("model.onnx") else tmp_path
        (target / file.name).write_bytes(file.read_bytes())
    (tmp_path / "onnx" / "model.onnx").rename(tmp_path / "onnx" / "model_q.onnx")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    model = ORTModelForCausalLM.from_pretrained(tmp_path, subfolder="onnx", file_name="model_q.onnx")
    assert isinstance(model, ORTLfm2ForCausalLM)
    assert model.generation_config.eos_token_id == [7, 8], "Optimum looks beside the graph alone"
    assert model.generate(prompt[None], **GREEDY)[0, 9:].tolist() == tokens


def test_session_options_and_providers(exported, gold):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    prompt, tokens = gold
    model = ORTModelForCausalLM.from_pretrained(
        exported("hybrid"), session_options=options, provider="CPUExecutionProvider", provider_options={}
    )
    assert model.session.get_session_options().intra_op_num_threads == 2
    assert model.use_io_binding
    quiet = ORTModelForCausalLM.from_pretrained(exported("hybrid")).session.get_session_options()
    assert quiet.log_severity_level > options.log_severity_level, "warnings at load are of choices made on purpose"
    assert model.to("cpu").generate(prompt[None], **GREEDY)[0, 9:].tolist() == tokens
    with pytest.raises(ValueError, match=r"CUDAExecutionProvider|cuda"):
        ORTModelForCausalLM.from_pretrained(exported("hybrid"), provider="CUDAExecutionProvider")


def test_settings_of_the_caller(exported):
    own = GenerationConfig(eos_token_id=5)
    assert ORTModelForCausalLM.from_pretrained(exported("hybrid"), generation_config=own).generation_config is own


def test_a_model_of_a_session(exported, gold):
    """As Optimum's classes, it can be made of a session and a config. The settings are those of the config."""
    prompt, tokens = gold
    loaded = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
    model = ORTLfm2ForCausalLM(config=loaded.config, session=loaded.session)
    assert model.generation_config.eos_token_id == 7
    assert model.generate(prompt[None], **GREEDY)[0, 9:].tolist() == tokens


def test_a_graph_that_lacks_a_cache_input(folder):
    graph = ir.load(folder / "model.onnx")
    gone = next(value for value in graph.graph.inputs if value.name == "past_conv.3")
    gone.name = "something_else"
    ir.save(graph, folder / "model.onnx")
    with pytest.raises(Lfm2Error, match=r"no input for the conv cache of layer 3"):
        ORTModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 300}, "vocabulary"),
        ({"conv_L_cache": 5}, "past_conv.0"),
        ({"num_key_value_heads": 4}, "past_key_values.2.key"),
        ({"layer_types": ["conv"] * 4 + ["full_attention"]}, "past_conv.2"),
        ({"layer_types": HYBRID[:4], "num_hidden_layers": 4}, "the cache input past_key_values.4.key"),
    ],
    ids=str,
)
def test_a_config_of_another_model(change, message, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Lfm2Error, match=message):
        ORTModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model_q4.onnx"])
@pytest.mark.parametrize("content", [b"", b"no graph"])
def test_a_file_that_is_no_graph(content, name, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(Lfm2Error, match=rf"onnxruntime cannot load \S+/{name} \(") as error:
        ORTModelForCausalLM.from_pretrained(folder, file_name=name if "q4" in name else None)
    assert "\n" not in str(error.value)


def test_a_graph_of_another_task(exported):
    with pytest.raises(Lfm2Error, match="text-generation"):
        ORTModelForCausalLM.from_pretrained(exported("hybrid", task="feature-extraction"))
