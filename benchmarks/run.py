"""Measure LFM2 in this package and in others, interleaved: `python benchmarks/run.py --out results`.

Without --checkpoint it makes one of the exact shape of LFM2-350M. Whatever is not installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report
from benchmarks.systems import SYSTEMS


CONTEXT_SYSTEMS = "ours-q4,genai-int4,llama-q4_0"
LONG_PROMPT_SYSTEM = "ours-q4"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results.json, table.md and the PNG")
    parser.add_argument("--work", type=Path, default=Path(".benchmarks"), help="folder of checkpoint and exports, kept between runs (7 GB)")
    parser.add_argument("--checkpoint", type=Path, help="an LFM2 checkpoint instead of the random one")
    parser.add_argument("--systems", type=_names, default=list(SYSTEMS), help=f"comma-separated, of: {', '.join(SYSTEMS)}")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each system, taken in turn")
    parser.add_argument("--repeats", type=int, default=3, help="chats in each process")
    parser.add_argument("--threads", type=int, default=2, help="for every system")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens after the first")
    parser.add_argument("--context", type=_numbers, default=[128, 256, 512, 1024, 2048, 4096], help="prompt lengths of the curve; '' for none")
    parser.add_argument("--context-systems", type=_names, default=_names(CONTEXT_SYSTEMS), help="of the curve")
    parser.add_argument("--long-prompt", type=int, default=16384, help=f"tokens whose memory is measured on {LONG_PROMPT_SYSTEM}; 0 for none")
    parser.add_argument(
        "--python", type=_interpreter, action="append", default=[], metavar="PACKAGE=PATH",
        help="the Python that has a package, where it cannot be installed beside the others",
    )  # fmt: skip
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/performance.md and the PNG beside it")
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(SYSTEMS):
        raise argparse.ArgumentTypeError(f"no system {', '.join(sorted(unknown))}; there are {', '.join(SYSTEMS)}")
    return names


def _interpreter(text: str) -> tuple[str, str]:
    package, _, path = text.partition("=")
    if package not in {entry.package for entry in SYSTEMS.values()} or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text}: PACKAGE=PATH, of a package that is measured and a Python that exists")
    return package, str(Path(path).absolute())  # not resolved: a virtual environment's Python is a link


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


class Bench:
    """Runs jobs in processes of their own; knows where everything lies."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pythons = dict(args.python)
        self.work = args.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.checkpoint = args.checkpoint.resolve() if args.checkpoint else self._made_checkpoint()
        self.vocabulary = json.loads((self.checkpoint / "config.json").read_text())["vocab_size"]
        self.errors: dict[str, str] = {}

    def _made_checkpoint(self) -> Path:
        from benchmarks.checkpoint import add_tokenizer, make_350m

        path = self.work / "lfm2-350m"
        if not (path / "tokenizer.json").exists():
            say("making the checkpoint")
            add_tokenizer(make_350m(path))
        return path

    def version(self, name: str) -> str | None:
        """Of the package that a system needs; None where it is not installed."""
        package = SYSTEMS[name].package
        return _version(package, self.pythons.get(package, sys.executable))

    def folder(self, name: str) -> Path:
        files = SYSTEMS[name].files
        return self.checkpoint if files is None else self.work / files

    def prepare(self, name: str) -> None:
        """Make a system's files, unless they are there and of this checkpoint and version."""
        entry, folder = SYSTEMS[name], self.folder(name)
        if entry.files is None:
            return
        key = f"{self.checkpoint} {_sources() if entry.module in ('ours', 'loop') else self.version(name)}"
        ready = folder.with_suffix(".ready")
        if ready.exists() and ready.read_text() == key:
            return
        say(f"{name}: making {folder.name}")
        ready.unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        self.job(name, "prepare", checkpoint=str(self.checkpoint))
        ready.write_text(key)

    def job(self, name: str, job: str, **values: Any) -> dict[str, Any]:
        """The result of one worker. Raises `subprocess.CalledProcessError` with the end of what it printed."""
        values |= {"job": job, "system": name, "folder": str(self.folder(name))}
        values |= {"threads": self.args.threads, "vocabulary": self.vocabulary}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [self.pythons.get(SYSTEMS[name].package, sys.executable), "-m", "benchmarks.worker", json.dumps(values)],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise WorkerError("\n".join((done.stdout + done.stderr).strip().splitlines()[-8:]) or f"exit {done.returncode}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def size(self, name: str) -> int:
        """Bytes of the files that a user would need."""
        folder = self.folder(name)
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "cache" not in p.relative_to(folder).parts)

    def attempt(self, names: list[str], job: str, **values: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Results of one job for each system in turn; one that fails is told of and left out from then on."""
        for name in names:
            if name in self.errors:
                continue
            try:
                if job == "prepare":
                    self.prepare(name)
                    result: dict[str, Any] = {}
                else:
                    result = self.job(name, job, **values)
            except WorkerError as error:
                self.errors[name] = str(error)
                say(f"{name} left out: {error}")
                continue
            yield name, result


class WorkerError(RuntimeError):
    """A worker that failed; the message is the end of what it printed."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that `results.json` holds."""
    bench = Bench(args)
    versions = {name: bench.version(name) for name in args.systems}
    for name, version in versions.items():
        if version is None:
            say(f"{name} left out: {SYSTEMS[name].package} is not installed")
    chosen = [name for name, version in versions.items() if version]
    ready = [name for name, _ in bench.attempt(chosen, "prepare")]
    systems: dict[str, dict[str, Any]] = {
        name: {**_description(name), "size": bench.size(name), "rounds": []} for name in ready
    }
    for number in range(args.rounds):
        for name, result in bench.attempt(ready, "chat", prompt=args.prompt, new=args.new, repeats=args.repeats):
            systems[name]["rounds"].append(result)
            speeds = " ".join(f"{median:.1f}" for median in map(report.median, (result["prefill"], result["decode"])))
            say(f"round {number + 1}: {name} {speeds} tok/s")
    results = {
        "machine": _machine() | {"versions": {SYSTEMS[name].package: versions[name] for name in chosen}},
        "options": {key: getattr(args, key) for key in ("rounds", "repeats", "threads", "prompt", "new")},
        "systems": systems,
    }
    if args.context:
        curve: dict[str, list[dict[str, float]]] = {}
        names = [name for name in args.context_systems if name in systems]
        for _ in range(args.rounds):
            for name, result in bench.attempt(names, "context", lengths=args.context, new=min(args.new, 32)):
                curve.setdefault(name, []).append(result["decode"])
                say(f"context: {name} {json.dumps({k: round(v, 1) for k, v in result['decode'].items()})}")
        results["context"] = curve
    if args.long_prompt and LONG_PROMPT_SYSTEM in systems:
        for _, result in bench.attempt([LONG_PROMPT_SYSTEM], "memory", prompt=args.long_prompt, new=2):
            results["long_prompt"] = {"tokens": args.long_prompt, **result}
    results["errors"] = bench.errors
    return results


def _description(name: str) -> dict[str, Any]:
    entry = SYSTEMS[name]
    return {"title": entry.title, "precision": entry.precision, "bits": entry.bits}


@functools.cache
def _version(package: str, python: str) -> str | None:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted((ROOT / "optimum_lfm2").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _machine() -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
    }


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    results = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = report.markdown(results)
    (args.out / "table.md").write_text(text)
    print(text)
    picture = report.plot(results, args.out / "decode_speed.png")
    if args.write_docs:
        report.write_docs(text, picture, ROOT / "docs")


if __name__ == "__main__":
    main()
