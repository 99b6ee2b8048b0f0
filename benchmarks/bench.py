"""Make the files of each system, and run a job for a system in a process of its own."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.systems import SYSTEMS


ROOT = Path(__file__).resolve().parent.parent


class WorkerError(RuntimeError):
    """A worker failed. The message is the end of its output."""


class Bench:
    """Prepares systems and runs jobs for them.

    Args:
        work: a folder for the systems' files, kept between runs.
        checkpoint: an LFM2 checkpoint.
        threads: how many threads every system gets.
        pythons: for a package, the Python interpreter that has it. The running one is used for the others.
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
        """Return the Python interpreter that runs a system."""
        return self.pythons.get(SYSTEMS[name].package, sys.executable)

    def version(self, name: str) -> str | None:
        """Return the version of the package that a system needs; None where it is not installed."""
        return _version(SYSTEMS[name].package, self.python(name))

    def folder(self, name: str) -> Path:
        """Return the folder of a system's files."""
        files = SYSTEMS[name].files
        return self.checkpoint if files is None else self.work / files

    def size(self, name: str) -> int:
        """Return the bytes of the files that a user of the system needs."""
        files = (path for path in self.folder(name).rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files if path.parent.name != "cache")

    def prepare(self, name: str) -> None:
        """Make a system's files, unless they exist for this checkpoint and version."""
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
        """Run one worker and return its result. Raises `WorkerError` where it fails."""
        values |= {"job": job, "system": name, "folder": str(self.folder(name))}
        values |= {"threads": self.threads, "vocabulary": self.vocabulary}
        done = subprocess.run(
            [self.python(name), "-m", "benchmarks.worker", json.dumps(values)],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).strip().splitlines()
            raise WorkerError("\n".join(lines[-8:]) or f"exit status {done.returncode}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def make(self, name: str) -> None:
        """Call `prepare`. If it fails, report that and leave the system out from then on."""
        try:
            self.prepare(name)
        except WorkerError as error:
            self._leave_out(name, error)

    def each(self, names: list[str], job: str, **values: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Run one job for each system in turn. A system that fails is reported and left out from then on."""
        for name in names:
            if name in self.errors:
                continue
            try:
                result = self.job(name, job, **values)
            except WorkerError as error:
                self._leave_out(name, error)
            else:
                yield name, result

    def _leave_out(self, name: str, error: WorkerError) -> None:
        self.errors[name] = str(error)
        say(f"{name} left out: {error}")


@functools.cache
def _version(package: str, python: str) -> str | None:
    code = f"import importlib.metadata as metadata; print(metadata.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def _sources(module: str) -> str:
    """Return a key that changes when a system's files would be made differently."""
    paths = [ROOT / "benchmarks" / "systems" / f"{module}.py"]
    if module in ("ours", "loop"):
        paths = sorted((ROOT / "optimum_lfm2").rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def say(line: str) -> None:
    """Print a line of progress."""
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)
