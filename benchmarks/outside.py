"""What a token costs outside of onnxruntime: `python -m benchmarks.outside`.

The model is LFM2-350M's shape in q4s. The first table has the time of a token in `generate()` and in the bare session
loop, and how much of it lies outside of the session. The second table has the time of single operations right after a
call of the graph, and once more at once. A call reads every weight, so that afterwards the code and the data of all
else have to come from memory again.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from benchmarks.bench import Bench
from benchmarks.checkpoint import random_checkpoint
from benchmarks.systems import base, loop, ours


SYSTEM, VARIANT = "ours-q4s", "q4s"


class Clocked:
    """A session that notes the seconds of each call."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, *args: Any) -> None:
        started = time.perf_counter()
        self._session.run_with_iobinding(*args)
        self.seconds.append(time.perf_counter() - started)


def token_times(system: base.System, session: Clocked, ids: list[int], new: int) -> tuple[float, float]:
    """Milliseconds of a token, and those of it outside of the session: medians of a text."""
    session.seconds.clear()
    steps = [after - before for before, after in itertools.pairwise(system.run(ids, new).stamps[1:])]
    outside = [step - inside for step, inside in zip(steps, session.seconds[-len(steps) :], strict=True)]
    return 1000 * statistics.median(steps), 1000 * statistics.median(outside)


def operations(width: int, columns: int) -> dict[str, Callable[[], Any]]:
    """What a step of `generate()` does once or more."""
    logits, token = torch.zeros(1, 1, width), torch.ones(1, 1, dtype=torch.int64)
    mask = torch.ones(1, columns, dtype=torch.int64)
    return {
        "`argmax` of the logits": lambda: logits[:, -1].argmax(-1),
        "a copy of the logits": lambda: logits.clone(),
        "a slice that changes nothing": lambda: logits[:, -1:],
        "`cat` of the mask": lambda: torch.cat([mask, token], dim=1),
        "`no_grad`": lambda: torch.no_grad().__enter__(),
        "transformers' output object": lambda: CausalLMOutputWithPast(logits=logits),
    }


def operation_times(call: Callable[[], Any], work: Callable[[], Any], count: int) -> tuple[float, float]:
    """Microseconds of an operation after a call of the graph, and of the same at once again: medians."""
    times = []
    for _ in range(count):
        call()
        start = time.perf_counter()
        work()
        middle = time.perf_counter()
        work()
        times.append((middle - start, time.perf_counter() - middle))
    first, second = (1e6 * statistics.median(column) for column in zip(*times, strict=True))
    return first, second


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path(".benchmarks"), help="folder for the models, kept between runs")
    add("--checkpoint", type=Path, help="an LFM2 checkpoint instead of the random one")
    add("--prompt", type=int, default=512, help="tokens of the prompt")
    add("--new", type=int, default=100, help="new tokens in each turn")
    add("--rounds", type=int, default=8)
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if min(args.prompt, args.new, args.rounds, args.threads) < 1:
        parser.error("--prompt, --new, --rounds and --threads must be 1 at least")

    bench = Bench(args.work, args.checkpoint or random_checkpoint(args.work), args.threads, {})
    bench.prepare(SYSTEM)
    options = bench.folder(SYSTEM), args.threads, args.prompt + args.new + 1, VARIANT
    generate, bare = ours.System(*options), loop.System(*options)
    clocks = Clocked(generate.model.session), Clocked(bare.session)
    generate.model._graph._session, bare.session = clocks
    systems = {"`generate()`": (generate, clocks[0]), "bare session loop": (bare, clocks[1])}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    numbers = random.Random(0)
    for number in range(args.rounds + 1):  # the first one does not count
        ids = numbers.choices(range(8, bench.vocabulary), k=args.prompt)
        for name, (system, clock) in systems.items():
            times = token_times(system, clock, ids, args.new)
            if number:
                found[name].append(times)
    print("| | a token, ms | outside of the session |\n| --- | --- | --- |")
    for name, turns in found.items():
        print(f"| {name} | " + " | ".join(f"{statistics.median(x):.2f}" for x in zip(*turns, strict=True)) + " |")

    torch.set_num_threads(1)  # as `generate` does
    print("\n| | after a call, µs | at once again, µs |\n| --- | --- | --- |")
    for name, work in operations(bench.vocabulary, args.prompt).items():
        bare.calls, bare.length = 0, args.prompt
        first, again = operation_times(lambda: bare.step(8), work, args.new)
        print(f"| {name} | {first:.0f} | {again:.0f} |")


if __name__ == "__main__":
    main()
