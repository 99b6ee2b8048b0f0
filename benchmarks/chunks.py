"""Measure how long the chunks of a prompt should be: `python -m benchmarks.chunks`.

The model is LFM2-350M's shape in q4. For each size of chunk, the table has the prefill speed of `generate()` and the
memory that the prompt adds to the process. Each figure is measured in a process of its own, and the sizes take turns.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.checkpoint import random_checkpoint


SYSTEM = "ours-q4"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path(".benchmarks"), help="folder for the models, kept between runs")
    add("--checkpoint", type=Path, help="an LFM2 checkpoint instead of the random one")
    add("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048], help="tokens of a chunk")
    add("--prompts", type=int, nargs="+", default=[2048, 8192], help="tokens of the prompts")
    add("--rounds", type=int, default=3, help="fresh processes for each size and prompt")
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if min(*args.sizes, *args.prompts, args.rounds, args.threads) < 1:
        parser.error("--sizes, --prompts, --rounds and --threads must be 1 at least")

    bench = Bench(args.work, args.checkpoint or random_checkpoint(args.work), args.threads, {})
    bench.prepare(SYSTEM)
    found = {(size, prompt): [] for size in args.sizes for prompt in args.prompts if size <= prompt}
    for _ in range(args.rounds):
        for size, prompt in found:
            found[size, prompt].append(bench.job(SYSTEM, "memory", prompt=prompt, new=2, chunk=size))
    print("| chunk | prompt | prefill tok/s | adds MB |\n| --- | --- | --- | --- |")
    for (size, prompt), runs in found.items():
        speeds = sorted(run["prefill"] for run in runs)
        added = statistics.median(run["added"] for run in runs) / 1e6
        spread = f"{statistics.median(speeds):.0f} [{speeds[0]:.0f} to {speeds[-1]:.0f}]"
        print(f"| {size} | {prompt} | {spread} | {added:.0f} |")


if __name__ == "__main__":
    main()
