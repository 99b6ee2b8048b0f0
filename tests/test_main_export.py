"""`main_export` from Python, and the export while a model is loaded."""

from __future__ import annotations

import json
import multiprocessing
import shutil

import onnx
import pytest
import torch
from commands import pickled
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM

from optimum_lfm2.errors import Lfm2Error


# From Python


def test_python_heeds_a_variant(checkpoint, tmp_path):
    main_export(str(checkpoint("hybrid")), tmp_path, variant="q4")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert any(node.op_type == "MatMulNBits" for node in graph.node)


def test_python_refuses_as_the_command_does(checkpoint, tmp_path):
    with pytest.raises(Lfm2Error, match="no variant nonsense"):
        main_export(str(checkpoint("hybrid")), tmp_path, variant="nonsense")
    with pytest.raises(Lfm2Error, match="bf16"):
        main_export(str(checkpoint("hybrid")), tmp_path, dtype="bf16")
    source = shutil.copytree(checkpoint("hybrid"), tmp_path / "source")
    pickled(source)
    with pytest.raises(Lfm2Error, match="save_pretrained"):
        main_export(str(source), tmp_path)
    with pytest.raises(Lfm2Error, match="save_pretrained"):
        ORTModelForCausalLM.from_pretrained(source, export=True)


def test_generation_settings_that_transformers_does_not_save_are_carried_over(checkpoint, tmp_path):
    """Release 4 and 5 load them with a warning, and fine-tunes have them."""
    source = shutil.copytree(checkpoint("hybrid"), tmp_path / "source")
    written = '{"do_sample": false, "temperature": 0.3, "eos_token_id": [7, 8]}'
    (source / "generation_config.json").write_text(written)
    main_export(str(source), tmp_path / "out", do_validation=False)
    assert (tmp_path / "out" / "generation_config.json").read_text() == written
    loaded = ORTModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert (loaded.temperature, loaded.eos_token_id) == (0.3, [7, 8])
    assert "written" not in loaded.to_dict()


@pytest.mark.parametrize("arguments", [{}, {"task": "text-generation-with-past"}], ids=["no task", "task"])
def test_python_names_a_wrong_field(arguments, checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("hybrid"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"layer_types": 7}))
    with pytest.raises(Lfm2Error, match="layer_types in"):
        main_export(str(source), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_workers_that_were_forked_export(checkpoint, tmp_path):
    """After a fork, two threads that use torch first at once fail in about half of the processes (torch 2.13)."""
    torch.ones(9).amax()
    source, context = str(checkpoint("hybrid")), multiprocessing.get_context("fork")
    for attempt in range(6):
        out = tmp_path / str(attempt)
        worker = context.Process(target=main_export, args=(source, out), kwargs={"do_validation": False})
        worker.start()
        worker.join(60)
        assert (worker.exitcode, (out / "model.onnx_data").exists()) == (0, True)


def test_python_refuses_an_unknown_argument(checkpoint, tmp_path):
    with pytest.raises(Lfm2Error, match="knows no varient"):
        main_export(str(checkpoint("hybrid")), tmp_path / "out", varient="q4")
    assert not (tmp_path / "out").exists()
    main_export(str(checkpoint("hybrid")), tmp_path / "out", sequence_length=5, do_validation=False)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"opset": 17}, "18 to 20"),
        ({"optimize": "O1"}, "--optimize"),
        ({"no_dynamic_axes": True}, "grow its cache"),
        ({"device": "cuda"}, "no GPU would help"),
        ({"height": 3}, "no such axis"),
        ({"sequence_length": 513}, "goes to 512"),
        ({"atol": -1.0}, "a tolerance is a number"),
    ],
    ids=str,
)
def test_python_refuses_options_as_the_command_does(option, says, checkpoint, tmp_path):
    with pytest.raises(Lfm2Error, match=says):
        main_export(str(checkpoint("hybrid")), tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_an_export_while_loading_refuses_a_variant(checkpoint):
    with pytest.raises(Lfm2Error, match="variant"):
        ORTModelForCausalLM.from_pretrained(checkpoint("hybrid"), export=True, variant="q4")
