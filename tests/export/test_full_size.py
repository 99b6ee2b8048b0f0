"""Exports at the exact shape of LFM2-350M: peak memory, size of the files, and some generated tokens."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.checkpoint import make_350m


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")]

ROOT = Path(__file__).parent.parent.parent
GIB = 2**30
FP32_WEIGHTS = 354_483_968 * 4

WITH_VALIDATION = "from optimum.commands.optimum_cli import main; main()"
WITHOUT = (
    "import sys, optimum_lfm2; from optimum.exporters.onnx import main_export;"
    "main_export(sys.argv[1], sys.argv[2], do_validation=False)"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_350m(tmp_path_factory.mktemp("full") / "lfm2-350m")


def peak_memory(command: list[str]) -> int:
    """Run a command, print its wall time, and return the peak of its and its children's resident memory, in bytes."""
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    peak = 0
    done = threading.Event()

    def poll() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, sum(map(_resident, _tree(process.pid))))

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        code = process.wait(600)
    finally:
        done.set()
        thread.join()
    print(f"\n{time.monotonic() - started:.1f} s, {peak / GIB:.2f} GiB")
    assert code == 0
    return peak


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in _tree(int(child)))]


def _resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def test_with_validation(source, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", WITH_VALIDATION, "export", "onnx", "--model", str(source), str(out)]
    assert peak_memory(command) <= 3.5 * GIB
    assert sum(path.stat().st_size for path in out.iterdir()) <= FP32_WEIGHTS + 40 * 2**20

    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(out)
    tokens = model.generate(torch.tensor([[1, 2000, 3000, 4000]]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert tokens.shape == (1, 12)


def test_without_validation(source, tmp_path):
    assert peak_memory([sys.executable, "-c", WITHOUT, str(source), str(tmp_path / "out")]) <= 2.3 * GIB
