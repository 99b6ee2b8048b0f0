"""What this package changes in other libraries, and what it puts back."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from optimum.exporters.tasks import TasksManager
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

from optimum_lfm2.command import quiet
from optimum_lfm2.compat import TRANSFORMERS_5


ROOT = Path(__file__).parent.parent
TASK = "text-generation-with-past"


def onnx_config(model, variant: str):
    make = TasksManager.get_exporter_config_constructor("onnx", model, task=TASK, library_name="transformers")
    config = make(model.config)
    config.variant = variant
    return config


@pytest.mark.parametrize("variant", ["default", "q4", "q8"])
def test_a_config_of_any_variant_is_pickled_and_copied(variant, gold_model):
    """Optimum makes a new configuration from the class of the first, as it does for decoders."""
    model = gold_model("hybrid")
    config = type(onnx_config(model, variant))(
        model.config, task="text-generation", use_past=True, use_past_in_inputs=True
    )
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert type(other) is type(config)
        assert (other.variant, other.scheme) == (variant, config.scheme)
        assert list(other.inputs) == list(config.inputs)
        assert type(other)(model.config, task="text-generation").variant == variant


def test_a_variant_replaces_another(gold_model):
    model = gold_model("hybrid")
    config = onnx_config(model, "q4")
    config.variant = "q8"
    assert (config.variant, type(config)(model.config, task="text-generation").variant) == ("q8", "q8")
    assert type(config) is type(onnx_config(model, "q8"))


VALIDATED_IN_A_SUBPROCESS = """
import sys
from pathlib import Path
import optimum_lfm2
from optimum.exporters.onnx import convert
from optimum.exporters.onnx.__main__ import TasksManager
import torch

if __name__ == "__main__":
    task, out = "text-generation-with-past", Path(sys.argv[2])
    model = TasksManager.get_model_from_task(task, sys.argv[1], torch_dtype=torch.float32)
    make = TasksManager.get_exporter_config_constructor("onnx", model, task=task, library_name="transformers")
    models = {"model": (model, make(model.config, task="text-generation", use_past=True, use_past_in_inputs=True))}
    _, outputs = convert.export_models(models, out)
    convert.validate_models_outputs(models, outputs, out)
    print("validated")
"""


def test_optimum_validates_in_a_subprocess(checkpoint, tmp_path):
    """`validate_models_outputs` with its defaults pickles the config and the model."""
    script = tmp_path / "script.py"
    script.write_text(VALIDATED_IN_A_SUBPROCESS)
    command = [sys.executable, str(script), str(checkpoint("hybrid")), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["validated"], done.stderr


def test_the_patcher_puts_an_instances_own_forward_back(gold_model):
    model = copy.deepcopy(gold_model("hybrid"))
    patched = onnx_config(model, "default").patch_model_for_export
    with patched(model):
        assert "forward" in vars(model)
    assert "forward" not in vars(model)
    own = model.forward = lambda *args, **kwargs: "mine"
    with patched(model):
        assert model.forward is not own
    assert model.forward is own


def test_quiet_leaves_the_severity_of_onnxruntime(monkeypatch):
    """The process-wide severity cannot be read, so it could not be put back. Each session has its own."""
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", None)
    with quiet():
        pass


@pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 has the class")
@pytest.mark.parametrize(("model_type", "read"), [("lfm2", True), ("lfm2_moe", True), ("llama", False)])
def test_a_tokenizer_of_transformers_5_is_read_for_our_types(model_type, read, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("trained"), tmp_path / "model")
    for name, change in (
        ("tokenizer_config.json", {"tokenizer_class": "TokenizersBackend"}),
        ("config.json", {"model_type": model_type}),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if read:
        by_name = AutoTokenizer.from_pretrained(
            pretrained_model_name_or_path=str(folder), use_fast=True, padding_side="left"
        )
        assert (
            by_name("Once upon").input_ids
            == AutoTokenizer.from_pretrained(checkpoint("trained"))("Once upon").input_ids
        )
        assert by_name.padding_side == "left"
    else:
        with pytest.raises(ValueError, match="TokenizersBackend does not exist"):
            AutoTokenizer.from_pretrained(folder)


def test_arguments_by_position_reach_optimum(exported):
    """`revision` is the fifth positional argument."""
    model = ORTModelForCausalLM.from_pretrained(exported("hybrid"), None, False, "", "main")
    assert model(torch.tensor([[3, 4]])).logits.shape[:2] == (1, 2)


def test_the_table_of_globals_names_what_the_code_touches():
    """docs/develop.md has a line for each name that is assigned in another library."""
    page = (ROOT / "docs" / "develop.md").read_text(encoding="utf-8")
    table = page.partition("## What we touch")[2].partition("\n## ")[0]
    source = {path: path.read_text(encoding="utf-8") for path in (ROOT / "optimum_lfm2").rglob("*.py")}
    put_back = re.findall(r'_put_back\(\w+, "(\w+)"', source[ROOT / "optimum_lfm2" / "compat.py"])
    assigned = re.findall(
        r"^ *(?:optimum[.\w]*|ORTModelForCausalLM|AutoTokenizer|pipelines|onnxruntime|convert)\.(\w+) = ",
        "\n".join(source.values()),
        flags=re.MULTILINE,
    )
    patched = re.findall(r'patch\.object\(\w+, "(\w+)"', "\n".join(source.values()))
    names = {*put_back, *assigned, *patched}
    assert len(names) >= 10
    assert not {name for name in names if f"`{name}`" not in table and f".{name}`" not in table}
