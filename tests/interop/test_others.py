"""Folders of onnxruntime-genai's builder, which have no `config.json`, load and give the tokens of transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from clients import END, NEW, up_to_end
from optimum.onnxruntime import ORTModelForCausalLM

from optimum_lfm2 import ORTLfm2ForCausalLM
from optimum_lfm2.caches import head_dim
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import member_of
from optimum_lfm2.sidecars.genai_config import GENAI_CONFIG, genai_config


builder = pytest.mark.skipif(
    not find_spec("onnxruntime_genai") or int(transformers.__version__.split(".")[0]) < 5,
    reason="onnxruntime-genai's builder needs onnxruntime-genai and transformers 5",
)
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}


def without_config(export: Path, folder: Path) -> Path:
    shutil.copytree(export, folder, ignore=shutil.ignore_patterns("config.json"))
    return folder


@pytest.mark.parametrize("name", ["hybrid", "conv_width_4", "all_attention", "multi_query", "own_head_dim"])
def test_a_configuration_is_read_from_genai_config_and_the_graph(name, exported, gold_model, tmp_path):
    folder = without_config(exported(name), tmp_path / "model")
    config = gold_model(name).config
    content = genai_config("model.onnx", "lfm2", config, member_of(config).cache_tensors(config), {})
    (folder / GENAI_CONFIG).write_text(json.dumps(content), encoding="utf-8")
    for cls in (ORTModelForCausalLM, ORTLfm2ForCausalLM):
        model = cls.from_pretrained(folder)
        assert isinstance(model, ORTLfm2ForCausalLM)
        known = "vocab_size hidden_size layer_types num_attention_heads num_key_value_heads num_hidden_layers"
        for key in [*known.split(), "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"]:
            assert getattr(model.config, key) == getattr(config, key), key
        if "conv" in config.layer_types:
            assert model.config.conv_L_cache == config.conv_L_cache
        assert model.config.head_dim == head_dim(config)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"model": {"type": "llama"}}, "of type llama, not lfm2"),
        ({"model": {"type": "lfm2"}}, "KeyError('decoder')"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_genai_config_that_says_something_else_is_refused(content, says, exported, tmp_path):
    folder = without_config(exported("trained"), tmp_path / "model")
    (folder / GENAI_CONFIG).write_text(content if content == "{" else json.dumps(content), encoding="utf-8")
    with pytest.raises(Lfm2Error) as error:
        ORTLfm2ForCausalLM.from_pretrained(folder)
    assert says in str(error.value)
    assert "copy" in str(error.value).lower()
    assert "\n" not in str(error.value)


def test_a_genai_folder_whose_graph_is_none(exported, tmp_path):
    folder = without_config(exported("trained"), tmp_path / "model")
    (folder / "genai_decoder.onnx_graph").write_bytes(b"no graph")
    with pytest.raises(Lfm2Error, match=r"genai_decoder.onnx_graph is no ONNX graph") as error:
        ORTLfm2ForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ['{"model": {"type": "llama"}}', "{", "[]"])
def test_a_genai_folder_that_is_not_said_to_be_ours_goes_to_optimum(content, exported, tmp_path):
    folder = without_config(exported("trained"), tmp_path / "model")
    (folder / GENAI_CONFIG).write_text(content, encoding="utf-8")
    with pytest.raises(Exception, match="library name could not be automatically inferred") as error:
        ORTModelForCausalLM.from_pretrained(folder)
    assert not isinstance(error.value, Lfm2Error)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    command = [sys.executable, str(Path(__file__).with_name("make_others.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@builder
def test_the_builders_fp32_gives_the_tokens_of_transformers(others, prompt_ids, gold_continuation):
    folder = others / "genai_fp32"
    assert not (folder / "config.json").exists()
    model = ORTModelForCausalLM.from_pretrained(folder)
    assert model.config.conv_L_cache == 3  # the graph's conv state has one column less
    golds = [up_to_end(gold_continuation(ids, NEW)) for ids in prompt_ids]
    for ids, gold in zip(prompt_ids, golds, strict=True):
        assert model.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist() == gold
    batch = padded(prompt_ids)
    for row, gold in zip(model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :], golds, strict=True):
        assert up_to_end(row.tolist()) == gold


@builder
def test_a_chat_goes_on_from_a_cache_of_the_builders_graph(others, prompt_ids, gold_continuation):
    model = ORTModelForCausalLM.from_pretrained(others / "genai_fp32")
    out = model.generate(torch.tensor([prompt_ids[0]]), return_dict_in_generate=True, **GREEDY)
    assert out.sequences[0, -1] == END
    second = out.sequences[0].tolist() + prompt_ids[1][1:]
    answer = model.generate(torch.tensor([second]), past_key_values=out.past_key_values, **GREEDY)
    assert answer[0, len(second) :].tolist() == up_to_end(gold_continuation(second, NEW))


@builder
def test_the_builders_int4_gives_the_tokens_of_onnxruntime_genai(others, prompt_ids):
    import onnxruntime_genai as og

    folder = others / "genai_int4"
    model, theirs = ORTModelForCausalLM.from_pretrained(folder), og.Model(str(folder))
    golds = []
    for ids in prompt_ids:
        params = og.GeneratorParams(theirs)
        params.set_search_options(do_sample=False, max_length=len(ids) + NEW)
        generator = og.Generator(theirs, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        golds.append(generator.get_sequence(0)[len(ids) :].tolist())
    batch = padded(prompt_ids)
    for row, gold in zip(model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :], golds, strict=True):
        tokens = up_to_end(row.tolist())
        assert tokens[: len(gold)] == gold  # onnxruntime-genai leaves out the end of turn
        assert tokens[len(gold) :] in ([], [END])
