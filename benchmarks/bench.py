"""Where the files of each system lie, and how a job for one runs in a process of its own."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.systems import SYSTEMS


ROOT = Path(__file__).resolve().parent.parent


class WorkerError(RuntimeError):
    """A worker that failed; the message is the end of what it printed."""


class Bench:
    """Prepares systems and runs jobs for them.

    Args:
        work: a folder for the systems' files, kept between runs.
        checkpoint: an LFM2 checkpoint.
        threads: for every system.
        pythons: by package, the Python that has it; the running one has the others.
    """

    def __init__(self, work: Path, checkpoint: Path, threads: int, pythons: Mapping[str, str]) -> None:
        self.work = work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.checkpoint = checkpoint.resolve()
        self.vocabulary = json.loads((self.checkpoint / "config.json").read_text())["vocab_size"]
        self.threads = threads
        self.pythons = pythons
        self.errors: dict[str, str] = {}

    def python(self, name: str) -> str:
        return self.pythons.get(SYSTEMS[name].package, sys.executable)

    def version(self, name: str) -> str | None:
        """Of the package that a system needs; None where it is not installed."""
        return _version(SYSTEMS[name].package, self.python(name))

    def folder(self, name: str) -> Path:
        files = SYSTEMS[name].files
        return self.checkpoint if files is None else self.work / files

    def size(self, name: str) -> int:
        """Bytes of the files that a user would need."""
        files = (path for path in self.folder(name).rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files if path.parent.name != "cache")

    def prepare(self, name: str) -> None:
        """Make a system's files, unless they are there and of this checkpoint and version."""
        name = SYSTEMS[name].of or name
        folder = self.folder(name)
        if folder == self.checkpoint:
            return
        key = f"{self.checkpoint} {SYSTEMS[name].options} {self.version(name)} {_sources(SYSTEMS[name].module)}"
        ready = folder.parent / f"{folder.name}.ready"
        if ready.exists() and ready.read_text() == key:
            return
        say(f"{name}: making {folder.name}")
        ready.unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        self.job(name, "prepare", checkpoint=str(self.checkpoint))
        ready.write_text(key)

    def job(self, name: str, job: str, **values: Any) -> dict[str, Any]:
        """The result of one worker. Raises `WorkerError`."""
        done = subprocess.run(self._command(name, job, values), **self._where(), capture_output=True)
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).strip().splitlines()
            raise WorkerError("\n".join(lines[-8:]) or f"exit status {done.returncode}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def start(self, name: str, job: str, **values: Any) -> subprocess.Popen:
        """A worker whose job takes lines and gives lines, through its `stdin` and `stdout`."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(self._command(name, job, values), **self._where(), **pipes)

    def _command(self, name: str, job: str, values: Mapping[str, Any]) -> list[str]:
        about = {"job": job, "system": name, "folder": str(self.folder(name))}
        about |= {"threads": self.threads, "vocabulary": self.vocabulary}
        return [self.python(name), "-m", "benchmarks.worker", json.dumps({**values, **about})]

    @staticmethod
    def _where() -> dict[str, Any]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {"cwd": ROOT, "env": environment, "text": True}

    def make(self, name: str) -> None:
        """`prepare`, or tell that it failed and leave the system out from then on."""
        with self.tolerant(name):
            self.prepare(name)

    @contextmanager
    def tolerant(self, name: str) -> Iterator[None]:
        """Where the block fails for a system, tell of it and leave the system out from then on."""
        try:
            yield
        except WorkerError as error:
            self.errors[name] = str(error)
            say(f"{name} left out: {error}")

    def each(self, names: list[str], job: str, **values: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Results of one job for each system in turn; one that fails is told of and left out from then on."""
        for name in names:
            if name in self.errors:
                continue
            with self.tolerant(name):
                yield name, self.job(name, job, **values)


@functools.cache
def _version(package: str, python: str) -> str | None:
    code = f"import importlib.metadata as metadata; print(metadata.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def _sources(module: str) -> str:
    """Changes with how a system's files are made."""
    paths = [ROOT / "benchmarks" / "systems" / f"{module}.py"]
    if module == "ours":
        paths = sorted((ROOT / "optimum_lfm2").rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)
