"""What a prefix saves that a cache holds: `python -m benchmarks.prefixes`.

The model is LFM2-350M's shape in q4. For each length of prefix, the table has the time to read it, and the times to
copy, to save and to load its cache: the median of the rounds, the lowest and the highest.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.checkpoint import random_checkpoint
from benchmarks.systems import ours


SYSTEM = "ours-q4"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and what the work returns."""
    started = time.perf_counter()
    result = work()
    return 1000 * (time.perf_counter() - started), result


def measure(model: Any, ids: list[int], file: Path) -> tuple[list[float], float]:
    """Milliseconds to read a prefix, and to copy, to save and to load its cache; the size of the file in MB."""
    reading, (_, cache) = timed(lambda: model(torch.tensor([ids]), logits_to_keep=1, return_dict=False))
    copying, _ = timed(lambda: copy.deepcopy(cache))
    saving, _ = timed(lambda: torch.save(cache, file))
    loading, _ = timed(lambda: torch.load(file, weights_only=False))
    return [reading, copying, saving, loading], file.stat().st_size / 1e6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path(".benchmarks"), help="folder for the models, kept between runs")
    add("--checkpoint", type=Path, help="an LFM2 checkpoint instead of the random one")
    add("--prefixes", type=int, nargs="+", default=[512, 4096], help="tokens")
    add("--rounds", type=int, default=7)
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if min(*args.prefixes, args.rounds, args.threads) < 1:
        parser.error("--prefixes, --rounds and --threads must be 1 at least")

    bench = Bench(args.work, args.checkpoint or random_checkpoint(args.work), args.threads, {})
    bench.prepare(SYSTEM)
    model = ours.System(bench.folder(SYSTEM), args.threads, max(args.prefixes), "q4").model
    torch.set_num_threads(args.threads)
    numbers = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        runs: dict[int, list[tuple[list[float], float]]] = {length: [] for length in args.prefixes}
        for number in range(args.rounds + 1):  # the first one does not count: it pages the weights in
            for length in args.prefixes:
                run = measure(model, numbers.choices(range(8, bench.vocabulary), k=length), Path(place, "prefix.pt"))
                if number:
                    runs[length].append(run)
    print("| prefix | to read, ms | to copy | to save | to load | file, MB |\n| --- | --- | --- | --- | --- | --- |")
    for length, results in runs.items():
        columns = zip(*(times for times, _ in results), strict=True)
        cells = ["{} [{} to {}]".format(*map(_short, (statistics.median(x), min(x), max(x)))) for x in columns]
        print(f"| {length} | {' | '.join(cells)} | {results[0][1]:.3g} |")


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.2g}"


if __name__ == "__main__":
    main()
