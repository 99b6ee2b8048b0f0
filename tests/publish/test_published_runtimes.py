"""A published folder in Optimum and onnxruntime-genai; `tests/interop` has Transformers.js."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import gold_tokens
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from publishing import DEMO, TRAINED, answer, genai_weights, run, story
from transformers import GenerationConfig

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.publish.precisions import DEFAULT, PRECISIONS
from optimum_lfm2.quality.evaluate import evaluate


def test_greedy_tokens_are_those_of_transformers(hub_folder, gold_model):
    """The folder alone: its fp32 file is what Optimum takes."""
    model = ORTModelForCausalLM.from_pretrained(hub_folder)
    assert Path(model.path).name == "model.onnx"
    out = model.generate(story(), max_new_tokens=60, do_sample=False)
    gold = gold_tokens(gold_model("trained").float(), story()[0], 60)
    assert out[0, story().shape[1] :].tolist() == gold


@pytest.mark.parametrize("precision", DEFAULT)
def test_every_precision_answers(hub_folder, precision):
    assert answer(hub_folder, subfolder="onnx", file_name=PRECISIONS[precision].file) == "3 plus 4 is 7."


def test_the_only_file_needs_no_name(hub_folder, tmp_path, caplog, monkeypatch):
    """Generation settings come from where config.json lies, though the file lies below."""
    for path in hub_folder.rglob("*"):
        if path.is_file() and (path.parent == hub_folder or "model_q4.onnx" in path.name):
            (tmp_path / path.relative_to(hub_folder)).parent.mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(hub_folder))
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.25}))
    monkeypatch.setattr("optimum.onnxruntime.modeling.logger.propagate", True)
    monkeypatch.setattr(GenerationConfig, "from_pretrained", classmethod(_as_for_an_id))
    for options in ({}, {"subfolder": "onnx"}):
        model = ORTModelForCausalLM.from_pretrained(tmp_path, **options)
        assert Path(model.path).name == "model_q4.onnx"
        assert model.generation_config.repetition_penalty == 1.25
    assert caplog.records == []


def test_one_of_several_files_is_not_chosen_by_chance(hub_folder, tmp_path):
    out = shutil.copytree(hub_folder, tmp_path / "out", ignore=shutil.ignore_patterns("model.onnx*"))
    with pytest.raises(Lfm2Error, match=r"model_q4\.onnx.* Choose one"):
        ORTModelForCausalLM.from_pretrained(out)


def _as_for_an_id(cls, name, subfolder="", **kwargs):
    """Look up generation_config.json as on the Hub, where transformers does look into the subfolder.

    In a local folder it reads the file at the top, whatever the subfolder.
    """
    if subfolder:
        raise OSError(f"{name} has no {subfolder}/generation_config.json")
    return cls.from_dict(json.loads((Path(name) / "generation_config.json").read_text()))


def test_evaluate_reads_a_file_of_it(hub_folder):
    quality = evaluate(hub_folder / "onnx" / "model_q4f16.onnx", TRAINED, DEMO / "heldout.txt", chunks=2, length=128)
    assert 0.9 < quality.top1_agreement <= 1


def genai_tokens(folder: Path) -> list[int]:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=story().shape[1] + 60)
    generator = og.Generator(model, params)
    generator.append_tokens(story().numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0)[story().shape[1] :].tolist()


@pytest.mark.once
@pytest.mark.parametrize("names", ["hub", "genai"])
def test_genai_runs_the_folder(names, gold_model, tmp_path):
    assert run("--model", TRAINED, tmp_path / "out", "--precisions", "fp32", "--cache-names", names) == 0
    decoder = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["filename"] == "onnx/genai_decoder.onnx_graph"
    assert genai_weights(tmp_path / "out") == {"model.onnx_data"}
    assert decoder["inputs"]["past_conv_names"] == {"hub": "past_conv.%d", "genai": "past.%d.conv"}[names]
    assert decoder["outputs"]["present_conv_names"] == {"hub": "present_conv.%d", "genai": "present.%d.conv"}[names]
    gold = gold_tokens(gold_model("trained").float(), story()[0], 60)
    assert genai_tokens(tmp_path / "out") == gold
    out = ORTModelForCausalLM.from_pretrained(tmp_path / "out").generate(story(), max_new_tokens=60, do_sample=False)
    assert out[0, story().shape[1] :].tolist() == gold
    javascript = "```js" in (tmp_path / "out" / "README.md").read_text()
    assert javascript == (names == "hub")  # Transformers.js knows only the Hub's names


def test_export_onnx_with_the_names_of_genais_builder(gold_model, tmp_path):
    main_export(str(TRAINED), str(tmp_path), do_validation=False, model_kwargs={"cache_names": "genai"})
    inputs = [value.name for value in ir.load(tmp_path / "model.onnx").graph.inputs]
    assert inputs[2:5] == ["past.0.conv", "past.1.conv", "past_key_values.2.key"]
    assert genai_tokens(tmp_path) == gold_tokens(gold_model("trained").float(), story()[0], 60)


def test_genai_takes_what_a_cpu_runs_best(hub_folder, small):
    for path in (hub_folder, small):
        assert genai_weights(path) == {"model_q4.onnx_data"}
    assert len(set(genai_tokens(hub_folder))) > 15
