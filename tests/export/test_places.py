"""Where an export is written: another file system, a mounted volume, a folder that another process writes to."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import prompts
from commands import run_file
from optimum.exporters.onnx import convert


ROOT = Path(__file__).parent.parent.parent
FILES = ["config.json", "generation_config.json", "model.onnx", "model.onnx_data"]
SHARED_MEMORY = Path("/dev/shm")
# A user's own mounts, as a container has them: nothing of it is seen outside, and it needs no root.
NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def logits(gold_model: Callable[[str], torch.nn.Module], name: str) -> np.ndarray:
    with torch.no_grad():
        return gold_model(name)(input_ids=prompts([9])[0][None], use_cache=False).logits.numpy()


def can_mount(place: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    mount = [*NAMESPACE, "mount", "-t", "tmpfs", "none", str(place)]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


def test_another_file_system(cli, checkpoint, gold_model, tmp_path):
    if not SHARED_MEMORY.is_dir() or SHARED_MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        out = Path(folder, "new", "out")
        assert cli("export", "onnx", "--model", checkpoint("hybrid"), out) == (0, "")
        assert sorted(path.name for path in out.iterdir()) == FILES
        assert list(out.parent.iterdir()) == [out]
        np.testing.assert_allclose(run_file(out), logits(gold_model, "hybrid"), atol=1e-4)


MOUNTED = """
set -e
mount -t tmpfs none "$1"           # where the volume is mounted can be read alone, as in a container
mkdir "$1/out"
mount -t tmpfs none "$1/out"
mount -o remount,ro "$1"
echo mine > "$1/out/notes.txt"
"$2" -c "from optimum.commands.optimum_cli import main; main()" export onnx --model "$3" "$1/out"
cp -r "$1/out/." "$4"
"""


@pytest.mark.once
def test_a_mounted_volume(checkpoint, gold_model, tmp_path):
    """OUT is a mount point, so that no file beside it can be renamed into it."""
    place, copied = tmp_path / "place", tmp_path / "copied"
    for folder in (place, copied):
        folder.mkdir()
    if not can_mount(place):
        pytest.skip("nothing can be mounted here")
    command = [*NAMESPACE, "sh", "-c", MOUNTED, "sh", place, sys.executable, checkpoint("hybrid"), copied]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in copied.iterdir()} == {*FILES, "notes.txt"}
    assert list(place.iterdir()) == []
    np.testing.assert_allclose(run_file(copied), logits(gold_model, "hybrid"), atol=1e-4)


def test_two_processes_to_one_folder(cli, checkpoint, gold_model, tmp_path, monkeypatch):
    """The second is refused while the first is at work, and the folder holds the first one's model."""
    context = multiprocessing.get_context("fork")
    at_work, may_end = context.Event(), context.Event()
    real = convert.validate_models_outputs

    def validate(*args, **kwargs):
        at_work.set()
        may_end.wait(60)
        return real(*args, **kwargs)

    def first() -> None:
        convert.validate_models_outputs = validate
        sys.exit(cli("export", "onnx", "--model", checkpoint("hybrid"), tmp_path / "out")[0])

    process = context.Process(target=first)
    process.start()
    try:
        assert at_work.wait(60)
        code, err = cli("export", "onnx", "--model", checkpoint("untied"), tmp_path / "out")
        assert (code, err.count("\n")) == (1, 1)
        assert "Another export writes to" in err
    finally:
        may_end.set()
        process.join(60)
    assert process.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    np.testing.assert_allclose(run_file(tmp_path / "out"), logits(gold_model, "hybrid"), atol=1e-4)
