"""What is read of an exported folder beside its graph: which file, whose weights, whose settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime import files
from optimum_lfm2.runtime.files import FileIdentity, generation_config_of, only_file


@pytest.mark.parametrize(
    ("names", "only"),
    [
        ([], None),
        (["model.onnx"], None),
        (["model.onnx", "model_q4.onnx"], None),
        (["model_q4.onnx"], "model_q4.onnx"),
        (["genai_decoder.onnx_graph", "model_q4.onnx"], "model_q4.onnx"),
    ],
)
def test_the_only_file(names, only, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    assert only_file(tmp_path) == only


def test_several_files_of_which_none_is_the_usual_one(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).touch()
    with pytest.raises(Lfm2Error, match=r"(a.onnx, b.onnx|b.onnx, a.onnx)\. Choose one"):
        only_file(tmp_path)


def test_the_weights_beside_a_graph_count_too(exported, tmp_path, monkeypatch):
    folder = shutil.copytree(exported("hybrid"), tmp_path / "model")
    graph, data = (folder / name for name in ("model.onnx", "model.onnx_data"))
    (tmp_path / "link.onnx").symlink_to(graph)
    assert [file for file, *_ in FileIdentity.of(graph).files] == [graph, data]
    assert FileIdentity.of(graph).path == graph
    monkeypatch.setattr(files, "LARGEST_WITHOUT_WEIGHTS", graph.stat().st_size)
    assert len(FileIdentity.of(graph).files) == 2
    monkeypatch.setattr(files, "LARGEST_WITHOUT_WEIGHTS", graph.stat().st_size - 1)
    assert [file for file, *_ in FileIdentity.of(graph).files] == [graph], "a large graph is not read for their names"
    monkeypatch.undo()
    data.unlink()
    assert [file for file, *_ in FileIdentity.of(graph).files] == [graph]


def test_settings_are_looked_for_in_the_subfolder_first(tmp_path, monkeypatch):
    (tmp_path / "onnx").mkdir()
    assert generation_config_of(tmp_path, "onnx", {}) is None
    for place, eos in (("generation_config.json", 8), ("onnx/generation_config.json", 9)):
        (tmp_path / place).write_text(f'{{"eos_token_id": {eos}}}')
        assert generation_config_of(tmp_path, "onnx", {}).eos_token_id == eos
    asked: list[dict] = []
    monkeypatch.setattr(files, "generation_settings", lambda name, **hub: asked.append({"name": name, **hub}))
    hub = {
        "revision": "main",
        "cache_dir": Path("cache"),
        "token": "t",
        "local_files_only": True,
        "force_download": True,
    }
    assert generation_config_of("me/model", "onnx", {**hub, "provider": "CPUExecutionProvider"}) is None
    assert asked == [{"name": "me/model", "subfolder": folder, **hub} for folder in ("onnx", "")]
