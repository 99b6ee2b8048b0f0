"""Measure one system in this process: `python -m benchmarks.worker JOB`. JOB is JSON, and so is the last output line.

There are four jobs. `prepare` makes a system's files. `chat` measures loading, prefill, decode and memory. `context`
measures decode after prompts of several lengths. `memory` measures how much memory a long prompt adds; the job may set
the length of the chunks.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.systems import SYSTEMS


SPARE = 64  # the cache has room for so many tokens beyond those of a job


def prompt_ids(length: int, vocabulary: int) -> list[int]:
    """Return the prompt's ids, the same for every system. None of them is a special token."""
    return random.Random(length).choices(range(8, vocabulary), k=length)


def resident(key: str) -> int:
    """Return a figure of /proc/self/status in bytes.

    `VmRSS` is the memory now. `VmHWM` is the peak since the start of the process, or since `forget_peak`.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def forget_peak() -> None:
    """Reset `VmHWM` to the memory now."""
    Path("/proc/self/clear_refs").write_text("5")


def chat(job: dict[str, Any]) -> dict[str, Any]:
    """Measure loading, prefill, decode and memory of one system."""
    ids = prompt_ids(job["prompt"], job["vocabulary"])
    started = time.perf_counter()
    for module in SYSTEMS[job["system"]].imports:
        importlib.import_module(module)
    imported, libraries = time.perf_counter(), resident("VmHWM")
    system = _load(job, job["prompt"] + job["new"])
    loaded = time.perf_counter()
    timing = system.run(ids, job["new"])  # this run is not counted, since it pages the weights in and makes the buffers
    peak = resident("VmHWM")
    prefill, decode = [], []
    for _ in range(job["repeats"]):
        timing = system.run(ids, job["new"])
        prefill.append(len(ids) / timing.prefill)
        decode.append(job["new"] / timing.decode)
    return {
        "import": imported - started, "load": loaded - imported, "libraries": libraries, "peak": peak,
        "prefill": prefill, "decode": decode, "tokens": timing.tokens,
    }  # fmt: skip


def context(job: dict[str, Any]) -> dict[str, Any]:
    """Measure the decode speed after prompts of several lengths."""
    system = _load(job, max(job["lengths"]) + job["new"])
    system.run(prompt_ids(16, job["vocabulary"]), 4)
    decode = {}
    for length in job["lengths"]:
        timing = system.run(prompt_ids(length, job["vocabulary"]), job["new"])
        decode[str(length)] = 1 / timing.typical_step  # the median, since a buffer grows once in many tokens
    return {"decode": decode}


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Measure the memory that a long prompt adds."""
    if "chunk" in job:
        rows = importlib.import_module("optimum_lfm2.runtime.rows")
        rows.PREFILL_CHUNK = job["chunk"]
    system = _load(job, job["prompt"] + job["new"])
    system.run(prompt_ids(64, job["vocabulary"]), 4)
    before = resident("VmRSS")
    forget_peak()
    timing = system.run(prompt_ids(job["prompt"], job["vocabulary"]), job["new"])
    return {"added": resident("VmHWM") - before, "prefill": job["prompt"] / timing.prefill}


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Make the files of one system."""
    SYSTEMS[job["system"]].prepare(Path(job["checkpoint"]), Path(job["folder"]))
    return {}


def _load(job: dict[str, Any], length: int):
    return SYSTEMS[job["system"]].load(Path(job["folder"]), job["threads"], length + SPARE)


def main() -> None:
    job = json.loads(sys.argv[1])
    result = {"prepare": prepare, "chat": chat, "context": context, "memory": memory}[job["job"]](job)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
