"""Measure LFM2 in this package and in other systems, in turn: `python -m benchmarks.run --out results`.

Without --checkpoint it makes a checkpoint of LFM2-350M's shape, or of --shape. A system that is not installed is left
out, with a line that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.bench import ROOT, Bench, say
from benchmarks.checkpoint import SHAPES, random_checkpoint
from benchmarks.systems import SYSTEMS


CONTEXT_SYSTEMS = "ours-q4,ours-q4-kv8,loop-q4,genai-int4,llama-q4_0"
CONTEXT_NEW = 32  # new tokens that are timed at each point of the curve
LONG_PROMPT_SYSTEMS = ("ours-q4", "ours-q4-kv8")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("results"), help="folder for results.json, table.md and the PNG")
    add("--work", type=Path, default=Path(".benchmarks"), help="folder for the models, kept between runs (14 GB)")
    add("--checkpoint", type=Path, help="an LFM2 checkpoint instead of the random one")
    add("--shape", choices=SHAPES, default="lfm2-350m", help="shape of the random checkpoint")
    add("--layers", type=int, help="layers of the random lfm2-8b-a1b, 24 by default; it needs transformers 5")
    add("--systems", type=_names, default=list(SYSTEMS), help=f"comma-separated, among {', '.join(SYSTEMS)}")
    add("--rounds", type=int, default=3, help="fresh processes for each system, taken in turn")
    add("--repeats", type=int, default=3, help="chats in each process")
    add("--threads", type=int, default=2, help="threads for every system")
    add("--prompt", type=int, default=512, help="tokens of the prompt")
    add("--new", type=int, default=64, help="new tokens after the first")
    lengths = [128, 256, 512, 1024, 2048, 4096]
    add("--context", type=_numbers, default=lengths, help="prompt lengths of the curve; '' for none")
    add("--context-systems", type=_names, default=_names(CONTEXT_SYSTEMS), help="systems of the curve")
    long_prompt = f"tokens whose memory is measured on {' and '.join(LONG_PROMPT_SYSTEMS)}; 0 for none"
    add("--long-prompt", type=int, default=16384, help=long_prompt)
    python = "the Python that has a package, where it cannot be installed beside the others; may be repeated"
    add("--python", type=_interpreter, action="append", default=[], metavar="PACKAGE=PATH", help=python)
    add("--write-docs", action="store_true", help="put the table into docs/performance.md, and the PNG beside it")
    args = parser.parse_args(argv)
    if min(args.rounds, args.repeats, args.threads, args.prompt, args.new) < 1:
        parser.error("--rounds, --repeats, --threads, --prompt and --new must be 1 at least")
    if args.checkpoint and args.shape != SHAPES[0]:
        parser.error("--checkpoint has a shape of its own: leave --shape out")
    if args.layers is not None and (args.layers < 1 or args.shape != "lfm2-8b-a1b"):
        parser.error("--layers is a number from 1 on, and of --shape lfm2-8b-a1b")
    return args


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(SYSTEMS):
        raise argparse.ArgumentTypeError(f"no system {', '.join(sorted(unknown))}; choose among {', '.join(SYSTEMS)}")
    return names


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _interpreter(text: str) -> tuple[str, str]:
    package, _, path = text.partition("=")
    known = {entry.package for entry in SYSTEMS.values()}
    if package not in known:
        raise argparse.ArgumentTypeError(f"no package {package}; choose among {', '.join(sorted(known))}")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{path or text} is no Python interpreter")
    return package, str(Path(path).absolute())  # links are kept: the Python of a virtual environment is a link


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return the contents of `results.json`."""
    versions = {name: bench.version(name) for name in args.systems}
    for name, version in versions.items():
        if version is None:
            say(f"{name} left out: {SYSTEMS[name].package} is not installed")
    names = [name for name in args.systems if versions[name]]
    results = {
        "machine": _machine() | {"versions": {SYSTEMS[name].package: versions[name] for name in names}},
        "options": {key: getattr(args, key) for key in ("rounds", "repeats", "threads", "prompt", "new")},
        "systems": chats(bench, names, args),
        "context": curve(bench, [name for name in args.context_systems if name in names], args),
    }
    if args.long_prompt:
        measured = [name for name in LONG_PROMPT_SYSTEMS if name in names]
        runs = dict(bench.each(measured, "memory", prompt=args.long_prompt, new=2))
        results["long_prompt"] = {"tokens": args.long_prompt, "systems": runs}
    results["errors"] = bench.errors
    return results


def chats(bench: Bench, names: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return, for each system, its description and the results of its rounds."""
    for name in names:
        bench.make(name)
    systems: dict[str, dict[str, Any]] = {}
    for number in range(args.rounds):
        for name, result in bench.each(names, "chat", prompt=args.prompt, new=args.new, repeats=args.repeats):
            entry = SYSTEMS[name]
            about = {"title": entry.title, "precision": entry.precision, "bits": entry.bits, "size": bench.size(name)}
            systems.setdefault(name, {**about, "rounds": []})["rounds"].append(result)
            prefill, decode = report.median(result["prefill"]), report.median(result["decode"])
            say(f"round {number + 1}: {name}: prefill {prefill:.0f}, decode {decode:.1f} tok/s")
    return systems


def curve(bench: Bench, names: list[str], args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Return, for each system and round, the decode speed by length of the prompt."""
    speeds: dict[str, list[dict[str, float]]] = {}
    for number in range(args.rounds if args.context else 0):
        for name, result in bench.each(names, "context", lengths=args.context, new=CONTEXT_NEW):
            speeds.setdefault(name, []).append(result["decode"])
            line = ", ".join(f"{speed:.1f} at {length}" for length, speed in result["decode"].items())
            say(f"context, round {number + 1}: {name}: {line}")
    return speeds


def _machine() -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    models = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    checkpoint = args.checkpoint or random_checkpoint(args.work, args.shape, args.layers)
    results = measure(Bench(args.work, checkpoint, args.threads, dict(args.python)), args)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    report.publish(path, ROOT / "docs" if args.write_docs else None)


if __name__ == "__main__":
    main()
