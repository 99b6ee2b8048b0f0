"""Many mutations of a checkpoint and of an export. Each ends in an error of one line, or in a right result."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from mutations import Spoil, export_mutations, mutations, untellable, untellable_exports
from optimum.commands.export.onnx import ONNXExportCommand, parse_args_onnx
from optimum.onnxruntime import ORTModelForCausalLM
from publishing import run as publish
from transformers import AutoModelForCausalLM

from benchmarks.checkpoint import add_tokenizer
from optimum.commands.lfm2.export_onnx import register
from optimum_lfm2.compat import TRANSFORMERS_5
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.modeling import ORTLfm2ForCausalLM


SECONDS = 120  # of one mutation, on a busy machine
ERROR = "optimum-cli: error: "
IDS = torch.tensor([[5, 9, 3, 17, 21, 4]])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    return add_tokenizer(make_checkpoint("hybrid", tmp_path_factory.mktemp("mutations")))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A forked child lacks the threads of this process, and would wait for them."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def export(source: Path, out: Path) -> int:
    """Run `optimum-cli export onnx` in this process and return its exit code."""
    parser = ArgumentParser()
    parse_args_onnx(parser)
    command = object.__new__(ONNXExportCommand)
    command.args = parser.parse_args(["--model", str(source), str(out)])
    try:
        command.run()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def run_export(source: Path, work: Path) -> str:
    """Return what is wrong with the end of an export, or "". `work/stderr` holds its standard error."""
    code = export(source, work / "out")
    sys.stderr.flush()
    said = (work / "stderr").read_text()
    left = sorted(path.name for path in work.iterdir() if path.name not in ("source", "stderr", "problem"))
    if code == 1 and said.startswith(ERROR) and said.count("\n") == 1:
        return f"left {left}" if left else ""
    if (code, said, left) != (0, "", ["out"]):
        return f"code {code}, left {left}, said {said[-400:]}"
    return compare(source, work / "out")


def run_publish(source: Path, work: Path) -> str:
    """What is wrong with how `export lfm2` refused `source`; "" if nothing is."""
    code = publish("--model", source, work / "out", "--precisions", "q4")
    sys.stderr.flush()
    said = (work / "stderr").read_text()
    if code == 1 and said.startswith(ERROR) and said.count("\n") == 1 and not (work / "out").exists():
        return ""
    return f"code {code}, said {said[-400:]}"


def compare(source: Path, out: Path) -> str:
    """The gold is what transformers loads of the mutated checkpoint: a mutation may give another valid model."""
    with torch.no_grad():
        gold = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(IDS, use_cache=False).logits.numpy()
    ours = ORTModelForCausalLM.from_pretrained(out)(IDS).logits.numpy()
    if not np.allclose(ours, gold, atol=1e-3, rtol=1e-3):
        return f"differs from transformers by {np.abs(ours - gold).max()}"
    return "" if (out / "tokenizer.json").is_file() and (out / "generation_config.json").is_file() else "files are lost"


def run_load(source: Path, work: Path, loads: type = ORTModelForCausalLM) -> str:
    """Return what is wrong with the runtime's answer to a mutated export, or ""."""
    try:
        loads.from_pretrained(source)(IDS)
    except Lfm2Error as error:
        return "" if str(error) and "\n" not in str(error) else f"not one line: {error}"
    return ""


def fork(work: Path, job: Callable[[Path, Path], str]) -> int:
    """Start a child of this process, which writes the result of `job` on `work/source` to `work/problem`."""
    if child := os.fork():
        return child
    try:
        descriptor = os.open(work / "stderr", os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        signal.alarm(SECONDS)  # a child that hangs is killed by it
        try:
            problem = job(work / "source", work)
        except BaseException as error:  # whatever it is, the parent has to hear of it
            problem = f"{type(error).__name__}: {str(error)[-400:]}"
        (work / "problem").write_text(problem)
    finally:
        os._exit(0)


def problems(
    good: Path, spoiled: Iterable[tuple[str, Spoil]], job: Callable[[Path, Path], str], place: Path
) -> dict[str, str]:
    """Return the mutations that end wrongly, each with what is wrong. As many run at once as there are cores."""
    found: dict[str, str] = {}
    running: dict[int, tuple[str, Path]] = {}

    def wait() -> None:
        child, status = os.waitpid(-1, 0)
        name, work = running.pop(child)
        problem = (work / "problem").read_text() if (work / "problem").is_file() else f"ended with status {status}"
        if problem:
            found[name] = problem
        shutil.rmtree(work)

    for number, (name, spoil) in enumerate(spoiled):
        if len(running) == (os.cpu_count() or 1):
            wait()
        work = place / str(number)
        shutil.copytree(good, work / "source")
        spoil(work / "source")
        running[fork(work, job)] = (name, work)
    while running:
        wait()
    return found


def test_a_mutated_checkpoint_is_one_line_or_the_right_file(good, tmp_path):
    """Each release runs every second one: together they run all."""
    found = problems(good, list(mutations(good))[TRANSFORMERS_5::2], run_export, tmp_path)
    assert not found, "\n".join(f"{name}: {problem}" for name, problem in found.items())


def test_a_model_that_cannot_be_told_is_one_line_of_export_lfm2(good, tmp_path):
    found = problems(good, untellable(good), run_publish, tmp_path)
    assert not found, "\n".join(f"{name}: {problem}" for name, problem in found.items())


def test_a_mutated_export_loads_or_is_one_error(good, tmp_path):
    assert export(good, tmp_path / "export") == 0
    spoiled = [*export_mutations(tmp_path / "export")][TRANSFORMERS_5::2]
    found = problems(tmp_path / "export", spoiled, run_load, tmp_path)
    assert not found, "\n".join(f"{name}: {problem}" for name, problem in found.items())


def test_a_genai_folder_that_cannot_be_told_is_one_error_of_our_class(good, tmp_path):
    assert export(good, tmp_path / "export") == 0
    found = problems(tmp_path / "export", untellable_exports(), partial(run_load, loads=ORTLfm2ForCausalLM), tmp_path)
    assert not found, "\n".join(f"{name}: {problem}" for name, problem in found.items())


def test_the_test_sees_a_traceback_a_hang_and_a_wrong_file(good, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 1)
    jobs = {
        "ZeroDivisionError": lambda source, work: str(1 / 0),
        "status 14": lambda source, work: time.sleep(60) or "",
        "": lambda source, work: "",
    }
    for says, job in jobs.items():
        found = problems(good, [("nothing", lambda folder: None)], job, tmp_path)
        assert says in found.get("nothing", "")
    export(good, tmp_path / "out")
    other = make_checkpoint("hybrid", tmp_path / "other", seed=2)
    assert "differs" in compare(other, tmp_path / "out")
