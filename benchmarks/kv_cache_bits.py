"""Measure how much the 8-bit KV cache changes the decode speed: `python -m benchmarks.kv_cache_bits`.

The model is LFM2-350M's shape in q4, once with a float KV cache and once with the 8-bit one, both in one process. They
take turns to decode some tokens after each prompt, round after round. So a slow minute of the machine affects both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.checkpoint import random_checkpoint
from benchmarks.worker import prompt_ids


SYSTEM = "ours-q4-kv8"
FILES = {"float": "model.onnx", "8 bits": "model_kv8.onnx"}


def measure(
    folder: Path, lengths: list[int], rounds: int, new: int, threads: int, vocabulary: int
) -> dict[tuple[str, int], list[float]]:
    """Return the median seconds of a decoding step in each round, by cache and length of the prompt."""
    import optimum_lfm2  # noqa: F401  before anything of optimum: transformers 5 needs it so

    # isort: split
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTModelForCausalLM

    from optimum_lfm2 import compat
    from optimum_lfm2.runtime.threads import single_torch_thread

    def load(file: str) -> Any:
        options = SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return ORTModelForCausalLM.from_pretrained(folder, file_name=file, session_options=options)

    prompt = torch.tensor([prompt_ids(max(lengths), vocabulary)])
    seconds: dict[tuple[str, int], list[float]] = {}
    with single_torch_thread():  # as `generate` does
        models = {cache: load(file) for cache, file in FILES.items()}
        caches = {
            (cache, length): models[cache](input_ids=prompt[:, :length], logits_to_keep=1)[compat.CACHE]
            for length in lengths
            for cache in FILES
        }
        for number in range(rounds + 1):
            for key, past in caches.items():
                steps = []
                for column in range(new):
                    started = time.perf_counter()
                    models[key[0]](input_ids=prompt[:, column : column + 1], logits_to_keep=1, **{compat.CACHE: past})
                    steps.append(time.perf_counter() - started)
                if number:  # round 0 is not counted, since it makes the buffers
                    seconds.setdefault(key, []).append(statistics.median(steps))
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path(".benchmarks"), help="folder for the models, kept between runs")
    add("--checkpoint", type=Path, help="an LFM2 checkpoint instead of the random one; it needs the demo's tokenizer")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[128, 4096],
        help="tokens of the prompts, the first is the base",
    )
    add("--rounds", type=int, default=12)
    add("--new", type=int, default=16, help="new tokens in each round")
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if min(*args.lengths, args.rounds, args.new, args.threads) < 1:
        parser.error("--lengths, --rounds, --new and --threads must be 1 at least")

    bench = Bench(args.work, args.checkpoint or random_checkpoint(args.work), args.threads, {})
    bench.prepare(SYSTEM)
    seconds = measure(bench.folder(SYSTEM), args.lengths, args.rounds, args.new, args.threads, bench.vocabulary)
    print("\n".join(table(seconds, args.lengths[0])))


def table(seconds: Mapping[tuple[str, int], list[float]], first: int) -> list[str]:
    """Format the result of `measure` as the lines of a table. Ratios are medians over rounds."""
    lines = [
        "| cache | after tokens | decode tok/s | by its own after the first length | by the float cache's |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (cache, length), own in seconds.items():
        speeds = sorted(1 / value for value in own)
        spread = f"{statistics.median(speeds):.1f} [{speeds[0]:.1f} to {speeds[-1]:.1f}]"
        others = seconds[cache, first], seconds["float", length]
        ratios = (statistics.median(a / b for a, b in zip(other, own, strict=True)) for other in others)
        lines.append(f"| {cache} | {length} | {spread} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return lines


if __name__ == "__main__":
    main()
