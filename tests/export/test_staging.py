"""A staged folder is written as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export.staging import staged


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_success_makes_the_folder_and_its_parents(tmp_path):
    with staged(tmp_path / "a" / "b" / "out") as folder:
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_text("new")
        assert not (tmp_path / "a" / "b" / "out").exists()
    assert tree(tmp_path) == {"a/b/out/onnx/model.onnx": "new"}
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_failure_leaves_no_parents(tmp_path):
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "a" / "b" / "out") as folder:
        (folder / "file").write_text("new")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_failing_move_is_undone(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    before = {"a": "old a", "c": "old c", "other": "mine"}
    for name, text in before.items():
        (out / name).write_text(text)
    real = Path.replace

    def replace(self, target):
        if self.name == "c" and Path(target).parent == out and Path(self).parent.name == "new":
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="No space"), staged(out) as folder:
        for name in "abc":
            (folder / name).write_text(f"new {name}")
    assert tree(tmp_path) == {f"out/{name}": text for name, text in before.items()}


def test_a_linked_output_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "real") == {"file": "new"}


def test_a_new_folder_can_be_read_by_whom_the_umask_says(tmp_path):
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_mounted_output_is_staged_inside(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    real = Path.stat

    def stat(self, **options):
        found = real(self, **options)
        if self != out:
            return found
        return os.stat_result((*found[:2], found.st_dev + 1, *found[3:10]))

    monkeypatch.setattr(Path, "stat", stat)
    with staged(out) as folder:
        assert folder.is_relative_to(out)
        (folder / "file").write_text("new")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/file"]
    with pytest.raises(ZeroDivisionError), staged(out) as folder:
        raise ZeroDivisionError
    assert tree(tmp_path) == {"out/file": "new"}


def test_two_at_once_do_not_mix(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        for name in ("out", "link"):
            with pytest.raises(Lfm2Error, match="Another export"), staged(tmp_path / name):
                pass
    assert tree(tmp_path / "out") == {"file": "first"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_a_lock_left_by_a_process_that_died_does_not_block(tmp_path):
    (tmp_path / ".out.lock").write_text("")
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
    assert tree(tmp_path) == {"out/file": "new"}
