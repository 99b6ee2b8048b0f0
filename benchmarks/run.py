"""Measure LFM2 in this package and in others, in turns: `python -m benchmarks.run --out results`.

Without --checkpoint it makes one of the shape of LFM2-350M, or of --shape. Whatever is not installed is left out, and
said so.
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
from benchmarks.quality import CHECKPOINT, divergences
from benchmarks.systems import SYSTEMS
from benchmarks.turns import Chat, take_turns


# Of one width of weights at a time, so that what is loaded at once fits into memory.
WIDTHS = (4, 8, 32)
LONG_PROMPT_SYSTEMS = ("ours-q4", "ours-q4-kv8")
QUALITY_LENGTH = 256  # tokens of a chunk


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("results"), help="folder for results.json, table.md and the PNG")
    add("--work", type=Path, default=Path(".benchmarks"), help="folder for the models, kept between runs (14 GB)")
    add("--checkpoint", type=Path, help="an LFM2 checkpoint instead of the random one")
    add("--shape", choices=SHAPES, default="lfm2-350m", help="of the random checkpoint")
    add("--layers", type=int, help="of the random lfm2-8b-a1b, which has 24 and needs transformers 5; fewer need less")
    add("--systems", type=_names, default=list(SYSTEMS), help=f"comma-separated, of: {', '.join(SYSTEMS)}")
    add("--rounds", type=int, default=12, help="in which each system is loaded and has each of its chats")
    add("--threads", type=int, default=2, help="for every system")
    chats = "tokens of a prompt and tokens after it; may be several (default: 512:48 4096:24)"
    add("--chats", type=_chat, nargs="+", default=[Chat(512, 48), Chat(4096, 24)], metavar="PROMPT:NEW", help=chats)
    add("--loads", type=int, default=3, help="fresh processes for the time to load and the memory; 0 for none")
    quality = "chunks of 256 tokens on which the KL divergence of the demo checkpoint is measured; 0 for none"
    add("--quality", type=int, default=8, help=quality)
    long_prompt = f"tokens whose memory is measured on {' and '.join(LONG_PROMPT_SYSTEMS)}; 0 for none"
    add("--long-prompt", type=int, default=16384, help=long_prompt)
    python = "the Python that has a package, where it cannot be installed beside the others; may be repeated"
    add("--python", type=_interpreter, action="append", default=[], metavar="PACKAGE=PATH", help=python)
    add(
        "--write-docs",
        action="store_true",
        help="put the tables into docs/performance.md and README.md, and the PNG into docs/",
    )
    args = parser.parse_args(argv)
    if min(args.rounds, args.loads + 1, args.threads) < 1:
        parser.error("--rounds and --threads must be 1 at least, and --loads 0")
    if args.checkpoint and args.shape != SHAPES[0]:
        parser.error("--checkpoint has a shape of its own: leave --shape out")
    if args.layers is not None and (args.layers < 1 or args.shape != "lfm2-8b-a1b"):
        parser.error("--layers is a number from 1 on, and of --shape lfm2-8b-a1b")
    return args


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(SYSTEMS):
        raise argparse.ArgumentTypeError(f"no system {', '.join(sorted(unknown))}; there are {', '.join(SYSTEMS)}")
    return names


def _chat(text: str) -> Chat:
    try:
        return Chat.read(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not PROMPT:NEW, such as 512:48") from None


def _interpreter(text: str) -> tuple[str, str]:
    package, _, path = text.partition("=")
    known = {entry.package for entry in SYSTEMS.values()}
    if package not in known:
        raise argparse.ArgumentTypeError(f"no package {package}; there are {', '.join(sorted(known))}")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{path or text} is no Python")
    return package, str(Path(path).absolute())  # not resolved: the Python of a virtual environment is a link


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that `results.json` holds."""
    versions = {name: bench.version(name) for name in args.systems}
    for name, version in versions.items():
        if version is None:
            say(f"{name} left out: {SYSTEMS[name].package} is not installed")
    names = [name for name in args.systems if versions[name]]
    results: dict[str, Any] = {
        "machine": _machine() | {"versions": {SYSTEMS[name].package: versions[name] for name in names}},
        "options": {"rounds": args.rounds, "threads": args.threads, "chats": [str(chat) for chat in args.chats]},
        "systems": systems(bench, names, args),
    }
    if args.quality and results["systems"]:
        quality = Bench(args.work / "quality", CHECKPOINT, args.threads, bench.pythons)
        own = [name for name in results["systems"] if SYSTEMS[name].of is None]
        for name, divergence in divergences(quality, own, args.quality, QUALITY_LENGTH).items():
            results["systems"][name]["divergence"] = divergence
    if args.long_prompt:
        measured = [name for name in LONG_PROMPT_SYSTEMS if name in names]
        runs = dict(bench.each(measured, "memory", prompt=args.long_prompt, new=2))
        results["long_prompt"] = {"tokens": args.long_prompt, "systems": runs}
    results["errors"] = bench.errors
    return results


def systems(bench: Bench, names: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By system, what it is, what loading it takes, and its speeds."""
    for name in names:
        bench.make(name)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name not in bench.errors:
            entry = SYSTEMS[name]
            about = {"title": entry.title, "precision": entry.precision, "bits": entry.bits, "head": entry.head}
            found[name] = {**about, "size": bench.size(name), "loads": [], "speeds": {}}
    for _ in range(args.loads):
        for name, result in bench.each(list(found), "load", prompt=args.chats[0].prompt, new=args.chats[0].new):
            found[name]["loads"].append(result)
    for bits in WIDTHS:
        width = [name for name in found if found[name]["bits"] == bits and name not in bench.errors]
        for name, speeds in take_turns(bench, width, args.chats, args.rounds).items():
            found[name]["speeds"] = speeds
    return {name: system for name, system in found.items() if system["speeds"]}


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
    report.publish(path, ROOT if args.write_docs else None)


if __name__ == "__main__":
    main()
