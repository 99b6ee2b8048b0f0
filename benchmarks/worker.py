"""One system in one process: `python -m benchmarks.worker JOB`, where JOB is JSON; the last line printed is JSON, too.

Jobs:
    prepare: makes a system's files.
    load: what it takes to load the system, and the tokens of one chat.
    serve: loads the system, then chats: a line of JSON in, a line of JSON out.
    logits: writes the logits of chunks of ids to a file.
    memory: what a long prompt adds, read in other chunks if the job says so.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

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


def load(job: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    for module in SYSTEMS[job["system"]].imports:
        importlib.import_module(module)
    imported, libraries = time.perf_counter(), resident("VmHWM")
    system = _load(job, job["prompt"] + job["new"])
    loaded = time.perf_counter()
    timing = system.run(prompt_ids(job["prompt"], job["vocabulary"]), job["new"])
    return {
        "import": imported - started,
        "load": loaded - imported,
        "libraries": libraries,
        "peak": resident("VmHWM"),
        "tokens": timing.tokens,
    }


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """For each chat of standard input its tokens a second: of the prompt, and of a typical step after it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    system = _load(job, job["length"])
    for line in sys.stdin:
        chat = json.loads(line)
        timing = system.run(prompt_ids(chat["prompt"], job["vocabulary"]), chat["new"])
        # The median step, not the mean: a buffer that grows does so once in many tokens.
        print(json.dumps([chat["prompt"] / timing.prefill, 1 / timing.typical_step]), file=answers, flush=True)
    return {}


def logits(job: dict[str, Any]) -> dict[str, Any]:
    """Writes float32 (chunks, length, vocabulary) to `job["out"]`, of the ids in `job["chunks"]`."""
    system = _load(job, len(job["chunks"][0]))
    np.save(job["out"], np.stack([system.logits(ids).astype(np.float32) for ids in job["chunks"]]))
    return {}


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


JOBS = {job.__name__: job for job in (prepare, load, serve, logits, memory)}


def main() -> None:
    job = json.loads(sys.argv[1])
    result = JOBS[job["job"]](job)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
