"""One system in one process: `python -m benchmarks.worker JOB`, where JOB is JSON; the last line printed is JSON, too.

Jobs: `prepare` makes a system's files; `chat` measures load, prefill, decode, memory; `context` decodes after prompts
of several lengths; `memory` says what a long prompt adds, read in other chunks if the job says so.
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


SPARE = 64  # tokens of room beyond those of a job


def prompt_ids(length: int, vocabulary: int) -> list[int]:
    """The same ids for every system, none of them special."""
    return random.Random(length).choices(range(8, vocabulary), k=length)


def resident(key: str) -> int:
    """Bytes from /proc/self/status: `VmRSS` now, `VmHWM` at most since the start or since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def chat(job: dict[str, Any]) -> dict[str, Any]:
    ids = prompt_ids(job["prompt"], job["vocabulary"])
    started = time.perf_counter()
    for module in SYSTEMS[job["system"]].imports:
        importlib.import_module(module)
    imported, libraries = time.perf_counter(), resident("VmHWM")
    system = _load(job, job["prompt"] + job["new"])
    loaded = time.perf_counter()
    timing = system.run(ids, job["new"])  # not counted: it pages the weights in and makes the buffers
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
    system = _load(job, max(job["lengths"]) + job["new"])
    system.run(prompt_ids(16, job["vocabulary"]), 4)
    decode = {}
    for length in job["lengths"]:
        timing = system.run(prompt_ids(length, job["vocabulary"]), job["new"])
        decode[str(length)] = 1 / timing.typical_step  # not the mean: buffers that grow do so once in many tokens
    return {"decode": decode}


def memory(job: dict[str, Any]) -> dict[str, Any]:
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
