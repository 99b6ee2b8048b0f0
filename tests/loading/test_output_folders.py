"""Folders that an export must leave alone: a checkpoint, what `export lfm2` wrote, and a model's own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from publishing import run as publish
from publishing import tree

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export.output import check_output
from optimum_lfm2.loading.config_check import JS_CONFIG
from optimum_lfm2.metadata import CHECKPOINT
from optimum_lfm2.publish.precisions import annotate


IDS = torch.tensor([[1, 50, 60, 70]])
STALE = {"use_external_data_format": {"model_q4.onnx": True}}


@pytest.fixture
def source(checkpoint, tmp_path) -> Path:
    return shutil.copytree(checkpoint("trained"), tmp_path / "work" / "source")


def by_its_name(source: Path) -> Path:
    return source


def by_a_link(source: Path) -> Path:
    (source.parent / "link").symlink_to(source)
    return source.parent / "link"


def by_another_path(source: Path) -> Path:
    return Path(os.path.relpath(source)) / ".." / source.name


@pytest.mark.parametrize("path", [by_its_name, by_a_link, by_another_path])
def test_a_checkpoints_own_folder(path, source, cli):
    out = path(source)
    before = tree(source)
    for command in ("onnx", "lfm2"):
        code, err = cli("export", command, "--model", source, out)
        assert (code, err.count("\n")) == (1, 1), err
        assert f"{out} holds a checkpoint (model.safetensors)" in err
    with pytest.raises(Lfm2Error, match="holds a checkpoint"):
        main_export(str(source), out)
    assert tree(source) == before


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_another_checkpoints_folder(name, source, tmp_path, cli):
    (tmp_path / name).touch()
    code, err = cli("export", "onnx", "--model", source, tmp_path)
    assert (code, err.count("\n")) == (1, 1), err
    assert f"holds a checkpoint ({name})" in err


def test_a_folder_of_export_lfm2(source, cli, tmp_path):
    out = tmp_path / "out"
    assert publish("--model", source, out, "--precisions", "q4") == 0
    before = tree(out)
    code, err = cli("export", "onnx", "--model", source, out)
    assert (code, err.count("\n")) == (1, 1), err
    assert f"{out} holds a folder of optimum-cli export lfm2 (onnx/model_q4.onnx)" in err
    with pytest.raises(Lfm2Error, match="optimum-cli export lfm2"):
        main_export(str(source), out, do_validation=False)
    assert tree(out) == before
    assert publish("--model", source, out, "--precisions", "q4") == 0  # it may write there again


def test_a_folder_of_parts(vl_folder, tmp_path):
    """`export onnx` may write LFM2-VL again where it wrote it, but not where `export lfm2` did."""
    check_output(vl_folder, in_parts=True)
    with pytest.raises(Lfm2Error, match="optimum-cli export lfm2"):
        check_output(vl_folder, in_parts=False)
    for change in (
        lambda onnx: (onnx / "vision_encoder.onnx").rename(onnx / "vision_encoder_q4.onnx"),
        lambda onnx: annotate(onnx / "decoder_model_merged.onnx", {CHECKPOINT: "0"}),
    ):
        folder = shutil.copytree(vl_folder, tmp_path / str(len(list(tmp_path.iterdir()))))
        change(folder / "onnx")
        with pytest.raises(Lfm2Error, match="optimum-cli export lfm2"):
            check_output(folder, in_parts=True)


def test_settings_of_other_files_are_not_copied(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {JS_CONFIG: STALE}))
    main_export(str(source), tmp_path / "out", do_validation=False)
    assert JS_CONFIG not in json.loads((tmp_path / "out" / "config.json").read_text())
    ORTModelForCausalLM.from_pretrained(source, export=True).save_pretrained(tmp_path / "saved")
    assert JS_CONFIG not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_a_model_is_saved_into_its_own_folder(exported, tmp_path):
    folder = shutil.copytree(exported("trained"), tmp_path / "export")
    before = tree(folder)
    model = ORTModelForCausalLM.from_pretrained(folder)
    expected = model(IDS).logits
    model.save_pretrained(folder)
    model.save_pretrained(tmp_path / "export" / ".." / "export")
    after = tree(folder)
    assert after.keys() == before.keys()
    settings = {"config.json", "generation_config.json"}
    assert {name for name in before if after[name] != before[name]} <= settings
    torch.testing.assert_close(ORTModelForCausalLM.from_pretrained(folder)(IDS).logits, expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "other")
    torch.testing.assert_close(
        ORTModelForCausalLM.from_pretrained(tmp_path / "other")(IDS).logits, expected, rtol=0, atol=0
    )


def test_so_is_one_that_takes_pictures(vl_folder, tmp_path):
    folder = shutil.copytree(vl_folder, tmp_path / "export")
    before = tree(folder)
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(folder)
    after = tree(folder)
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} <= {"config.json", "generation_config.json"}
    expected = model(IDS).logits
    again = ORTLfm2VlForConditionalGeneration.from_pretrained(folder)
    torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=0)
