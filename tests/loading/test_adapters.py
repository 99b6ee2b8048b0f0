"""A folder of a PEFT adapter is told of `merge_and_unload`, where it is exported and where it is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from optimum.commands.optimum_cli import main
from optimum.onnxruntime import ORTModelForCausalLM

from optimum_lfm2 import ORTLfm2ForCausalLM
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.loading.adapters import check_adapter


@pytest.fixture
def adapter(tmp_path):
    def make(base: object) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        (folder / "adapter_model.safetensors").touch()
        return folder

    return make


@pytest.mark.parametrize("cls", [ORTModelForCausalLM, ORTLfm2ForCausalLM])
@pytest.mark.parametrize("options", [{}, {"export": True}])
def test_it_is_refused_where_it_is_loaded(cls, options, adapter, checkpoint):
    with pytest.raises(Lfm2Error, match="merge_and_unload") as error:
        cls.from_pretrained(adapter(checkpoint("hybrid")), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", [["onnx"], ["lfm2"]])
def test_it_is_refused_by_the_commands(command, adapter, monkeypatch, capsys, tmp_path):
    folder = adapter("LiquidAI/LFM2-350M")
    arguments = ["optimum-cli", "export", *command, "--model", str(folder), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    said = str(ended.value.code) + capsys.readouterr().err
    assert f"{folder} is a PEFT adapter of LiquidAI/LFM2-350M" in said
    assert "merge_and_unload" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", ["meta-llama/Llama-3.2-1B", "nowhere", None])
def test_one_of_another_model_is_left_alone(base, adapter):
    check_adapter(adapter(base))


def test_a_merged_model_is_left_alone(adapter, checkpoint):
    folder = adapter(checkpoint("hybrid"))
    (folder / "config.json").write_text("{}")
    check_adapter(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="PEFT adapter"):
        check_adapter(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_one_that_cannot_be_read_goes_to_optimum(content, adapter):
    folder = adapter("LiquidAI/LFM2-350M")
    (folder / "adapter_config.json").write_text(content)
    check_adapter(folder)
