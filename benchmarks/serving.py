"""What requests gain by sharing calls: `python -m benchmarks.serving`.

The model is LFM2-350M's shape in q4s. The first table has the tokens a second of several requests together, and of the
same one after the other. The second has the time to the first token of a chat's first turn and of its second one, which
goes on from what was read. The third has what a step of the scheduler takes outside of the session, with one row. All
take turns in each round; figures are medians, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.bench import Bench
from benchmarks.checkpoint import random_checkpoint
from benchmarks.outside import Clocked
from benchmarks.systems import ours
from optimum_lfm2.runtime.picking import Picker
from optimum_lfm2.runtime.scheduler import Limits, ScheduledRequest, Scheduler
from optimum_lfm2.runtime.threads import single_torch_thread


SYSTEM, VARIANT = "ours-q4s", "q4s"


def request(model: Any, ids: list[int], new: int) -> ScheduledRequest:
    """A greedy request that nothing ends before its last token."""
    prompt = torch.tensor(ids)
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    picker = Picker(model, prompt, config)
    picker._ends = frozenset()  # of the model's own settings
    return ScheduledRequest(prompt, picker)


def run(scheduler: Scheduler, requests: list[ScheduledRequest]) -> tuple[float, float]:
    """Seconds until the first request has a token, and until all have ended."""
    started, first = time.perf_counter(), 0.0
    for one in requests:
        scheduler.submit(one)
    while not scheduler.idle:
        scheduler.step()
        if not first and requests[0].tokens:
            first = time.perf_counter() - started
    if failed := [one.error for one in requests if one.error is not None]:
        raise failed[0]
    return first, time.perf_counter() - started


def fresh(model: Any, clients: int, columns: int) -> Scheduler:
    """A scheduler that has read nothing."""
    return Scheduler(model._graph, model.layout, model.device, Limits(rows=clients, tokens=clients * columns))


def together_and_apart(model: Any, prompts: list[list[int]], new: int) -> tuple[float, float]:
    """Tokens a second of all requests together, and of one after the other."""
    count, columns = len(prompts) * new, len(prompts[0]) + new
    _, shared = run(fresh(model, len(prompts), columns), [request(model, ids, new) for ids in prompts])
    scheduler = fresh(model, 1, columns)
    alone = sum(run(scheduler, [request(model, ids, new)])[1] for ids in prompts)
    return count / shared, count / alone


def two_turns(model: Any, ids: list[int], more: list[int], new: int) -> tuple[float, float]:
    """Seconds to the first token of a chat's first turn, and of its second."""
    scheduler = fresh(model, 1, len(ids) + len(more) + 2 * new)
    turn = request(model, ids, new)
    first, _ = run(scheduler, [turn])
    again, _ = run(scheduler, [request(model, [*ids, *turn.tokens, *more], new)])
    return first, again


def outside(model: Any, clock: Clocked, ids: list[int], new: int) -> float:
    """Milliseconds of a step outside of the session, with one row."""
    scheduler, one, times = fresh(model, 1, len(ids) + new), request(model, ids, new), []
    scheduler.submit(one)
    while not scheduler.idle:
        clock.seconds.clear()
        started = time.perf_counter()
        scheduler.step()
        spent = time.perf_counter() - started
        if len(one.tokens) > 2 and one.ended is None:
            times.append(spent - sum(clock.seconds))
    return 1000 * statistics.median(times)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path(".benchmarks"), help="folder for the models, kept between runs")
    add("--checkpoint", type=Path, help="an LFM2 checkpoint instead of the random one")
    add("--clients", type=int, default=8)
    add("--prompt", type=int, default=128, help="tokens of a client's prompt")
    add("--new", type=int, default=128, help="new tokens of each request")
    add("--turn", type=int, default=2000, help="tokens of a chat's first turn")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if min(args.clients, args.prompt, args.turn, args.rounds, args.threads) < 1 or args.new < 4:
        parser.error("--new must be 4 at least, the others 1")

    bench = Bench(args.work, args.checkpoint or random_checkpoint(args.work), args.threads, {})
    bench.prepare(SYSTEM)
    model = ours.System(bench.folder(SYSTEM), args.threads, args.turn + 3 * args.new, VARIANT).model
    clock = Clocked(model.session)
    model._graph._session = clock
    numbers = random.Random(0)

    def text(length: int) -> list[int]:
        return numbers.choices(range(8, bench.vocabulary), k=length)

    found: list[tuple[float, ...]] = []
    with single_torch_thread():
        for number in range(args.rounds + 1):  # the first one does not count
            shared, alone = together_and_apart(model, [text(args.prompt) for _ in range(args.clients)], args.new)
            first, again = two_turns(model, text(args.turn), text(32), 16)
            spent = outside(model, clock, text(args.prompt), args.new)
            if number:
                found.append((shared, alone, shared / alone, 1000 * first, 1000 * again, again / first, spent))
    together, apart, gain, first_turn, second_turn, share, step = (_spread(x) for x in zip(*found, strict=True))
    print(f"| {args.clients} requests | tok/s |\n| --- | --- |")
    print(f"| together | {together} |\n| one after the other | {apart} |\n| times as fast | {gain} |\n")
    print(f"| first token of a chat, {args.turn} tokens | ms |\n| --- | --- |")
    print(f"| first turn | {first_turn} |\n| second turn | {second_turn} |\n| of the first | {share} |\n")
    print(f"| a step outside of the session, one row | ms |\n| --- | --- |\n| | {step} |")


def _spread(values: Any) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g} to {max(values):.3g}]"


if __name__ == "__main__":
    main()
