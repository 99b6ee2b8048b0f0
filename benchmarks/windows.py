"""Measure what sliding attention costs, by the tokens before it: `python -m benchmarks.windows`.

It needs transformers 5.23.

First, time. Models of LFM3-1.7B's widths in q4, whose layers are all of one kind: a layer's time for one token, and for
a chunk of a prompt, after so many tokens. Last, a prompt at once, without chunks. The kinds take turns.

Then memory. What a prompt adds to a process of `generate()`, with windows and with all keys and values in the cache.
The model has the caches of LFM3-1.7B, and is narrow otherwise.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, say
from benchmarks.checkpoint import add_tokenizer, save_seeded
from benchmarks.graph_turns import Graph


KINDS = ("sliding_attention", "full_attention", "conv")
LAYERS = 4
CHUNK = 512
STEPS = 20  # calls of one token a turn
SYSTEM = "ours-q4"
NARROW = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 512}


def exported(work: Path, name: str, **options: Any) -> Bench:
    """A bench with an export of a seeded LFM3, made under `work` if missing. `options` are those of `Lfm3Config`."""
    from transformers import Lfm3Config, Lfm3ForCausalLM  # of transformers 5.23

    path = work / f"{name}-checkpoint"
    if not (path / "tokenizer.json").exists():  # this file is written last
        config = Lfm3Config(pad_token_id=0, bos_token_id=1, eos_token_id=7, **options)
        add_tokenizer(save_seeded(path, Lfm3ForCausalLM, config))
    bench = Bench(work / name, path, 2, {})
    bench.prepare(SYSTEM)
    return bench


def times(
    work: Path, lengths: Sequence[int], rounds: int, threads: int, chunk: int = CHUNK, **options: Any
) -> Iterator[tuple[str, str, list[float]]]:
    """The milliseconds of a layer.

    Args:
        work: a folder for the models.
        lengths: tokens before the call.
        rounds: those that count. One more comes first.
        threads: of onnxruntime.
        chunk: the tokens of a chunk.
        options: of `Lfm3Config`, to change the widths.

    Yields:
        The call in words, the kind of layer, and the layer's time in each round.
    """
    longest = max(lengths)
    graphs = {}
    for kind in KINDS:
        widths = {"vocab_size": 512, "num_hidden_layers": LAYERS, "layer_types": [kind] * LAYERS, **options}
        bench = exported(work, kind, **widths)
        graphs[kind] = Graph(bench.folder(SYSTEM) / "model.onnx", threads, longest + chunk)
    calls = {f"one token after {length}": (1, length, STEPS) for length in lengths}
    calls |= {f"{chunk} tokens after {length}": (chunk, length, 1) for length in lengths}
    calls[f"{longest} tokens at once"] = (longest, 0, 1)
    for call, (tokens, past, count) in calls.items():
        bound = {kind: graph.call(tokens, past) for kind, graph in graphs.items()}
        found: dict[str, list[float]] = {kind: [] for kind in graphs}
        for number in range(rounds + 1):
            for kind, graph in graphs.items():
                found[kind].append(graph.milliseconds(bound[kind], count) / LAYERS)
            say(f"{call}: round {number} of {rounds}")
        for kind, own in found.items():
            yield call, kind, own[1:]


def memory(work: Path, lengths: Sequence[int], **options: Any) -> Mapping[int, tuple[int, int]]:
    """Bytes that a prompt of each length adds to the process: with windows, and with all keys and values in the cache.

    Args:
        work: a folder for the models.
        lengths: tokens of the prompts.
        options: of `Lfm3Config`, to change the shape.
    """
    options = NARROW | options
    benches = [
        exported(work, "windows", **options),
        # A window as long as a text can be: the layer is then full attention.
        exported(
            work, "all-keys", **options, sliding_window=2 * max(lengths), max_position_embeddings=2 * max(lengths)
        ),
    ]
    return {
        length: tuple(bench.job(SYSTEM, "memory", prompt=length, new=2)["added"] for bench in benches)  # type: ignore[misc]
        for length in lengths
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path(".benchmarks"), help="folder for the models, kept between runs")
    add("--lengths", type=int, nargs="+", default=[512, 8192], help="tokens before a call, or of a prompt")
    add("--memory", type=int, nargs="*", default=[8192, 32768], help="tokens of the prompts whose memory is measured")
    add("--rounds", type=int, default=9)
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if min(*args.lengths, *args.memory, args.rounds, args.threads) < 1:
        parser.error("--lengths, --memory, --rounds and --threads must be 1 at least")
    args.work.mkdir(parents=True, exist_ok=True)

    rows: dict[str, list[str]] = {}
    for call, _, milliseconds in times(args.work, args.lengths, args.rounds, args.threads):
        low, middle, high = min(milliseconds), statistics.median(milliseconds), max(milliseconds)
        rows.setdefault(call, []).append(f"{middle:.3g} [{low:.3g} to {high:.3g}]")
    print("| ms a layer | " + " | ".join(KINDS) + " |\n| --- |" + " --- |" * len(KINDS))
    for call, cells in rows.items():
        print(f"| {call} | {' | '.join(cells)} |")
    if args.memory:
        print("\n| a prompt adds | windows MB | all keys and values MB |\n| --- | --- | --- |")
        for length, found in memory(args.work, args.memory).items():
            print(f"| {length} tokens | {' | '.join(f'{size / 1e6:.0f}' for size in found)} |")


if __name__ == "__main__":
    main()
