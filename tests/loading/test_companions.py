"""Files beside the weights that Optimum would leave out, or carry over broken, without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.loading.companions import check_tokenizer, generation_settings
from optimum_lfm2.loading.modules import find_modules
from optimum_lfm2.weights.checkpoint import find_tensors


def written(folder: Path, name: str, content: object) -> str:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": "warm"},
        {"temperature": True},
        {"top_k": 5.5},
        {"max_length": 2**31},
        {"max_new_tokens": [5]},
        {"do_sample": 1},
        {"eos_token_id": [7, "8"]},
        {"eos_token_id": -2},
        {"pad_token_id": [0]},
    ],
    ids=str,
)
def test_a_setting_that_cannot_be(settings, tmp_path):
    (name,) = settings
    with pytest.raises(Lfm2Error, match=f"^{name} in .*generation_config.json is .*, which cannot be") as error:
        generation_settings(written(tmp_path, "generation_config.json", settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings", [{"early_stopping": "x"}, {"watermarking_config": {"a": 1}}, {"dtype": 7}], ids=str
)
def test_settings_that_transformers_does_not_take(settings, tmp_path):
    with pytest.raises(Lfm2Error, match="not what transformers can use") as error:
        generation_settings(written(tmp_path, "generation_config.json", settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "says"), [("[]", "holds no JSON object"), ("{", "cannot be read as JSON")])
def test_files_that_hold_something_else(content, says, tmp_path):
    for name, read in (("generation_config.json", generation_settings), ("tokenizer_config.json", check_tokenizer)):
        with pytest.raises(Lfm2Error, match=f"{name} {says}"):
            read(written(tmp_path, name, content))


def test_settings_that_are_right(tmp_path):
    assert generation_settings(str(tmp_path)) is None
    settings = {"temperature": 1, "top_p": 0.5, "eos_token_id": [7, -1], "do_sample": True, "max_length": None}
    read = generation_settings(written(tmp_path, "generation_config.json", settings))
    assert (read.temperature, read.top_p, read.eos_token_id, read.do_sample) == (1, 0.5, [7, -1], True)


@pytest.mark.parametrize("content", [{}, {"model": 7}])
def test_a_tokenizer_that_does_not_load(content, tmp_path):
    with pytest.raises(Lfm2Error, match=r"tokenizer beside .*tokenizer.json cannot be loaded") as error:
        check_tokenizer(written(tmp_path, "tokenizer.json", content))
    assert "\n" not in str(error.value)


def test_no_tokenizer_is_no_error(tmp_path):
    check_tokenizer(str(tmp_path))
    check_tokenizer(written(tmp_path, "tokenizer_config.json", {}))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ({}, "holds no list of modules"),
        ([7], "holds no list of modules"),
        ([{"type": "mine.Pooling", "path": "1"}], "names the module mine.Pooling"),
        ([{"type": "sentence_transformers.models.Dense", "path": "/1"}], "outside the checkpoint"),
        ([{"type": "sentence_transformers.models.Dense", "path": "a/../../1"}], "outside the checkpoint"),
        ([{"type": "sentence_transformers.models.Dense", "path": "..\\1"}], "outside the checkpoint"),
    ],
)
def test_modules_that_cannot_be_carried_over(content, says, tmp_path):
    with pytest.raises(Lfm2Error, match=says) as error:
        find_modules(written(tmp_path, "modules.json", content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["model.safetensors"]}], ids=str)
def test_an_index_without_a_map(index, tmp_path):
    with pytest.raises(Lfm2Error, match="has no weight_map"):
        find_tensors(written(tmp_path, "model.safetensors.index.json", index))


@pytest.mark.parametrize(
    "shard", ["a.bin", "../a.safetensors", "b/a.safetensors", "b\\a.safetensors", "\0.safetensors", 7]
)
def test_a_shard_that_is_no_file_beside_the_index(shard, tmp_path):
    with pytest.raises(Lfm2Error, match="is no safetensors file beside it"):
        find_tensors(written(tmp_path, "model.safetensors.index.json", {"weight_map": {"a": shard}}))
