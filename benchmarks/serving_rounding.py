"""How often a shared call gives another greedy token than the request alone: `python -m benchmarks.serving_rounding`.

Kernels of quantised weights may round otherwise for several rows than for one. The texts are pieces of
`demo/heldout.txt` of several lengths, and the model is the trained one of `demo/checkpoint`. A random model's likeliest
tokens lie closer together than a trained one's, so its figures would say nothing. Tokens are compared up to the first
that differs in each text, since the texts are not the same after it.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.bench import ROOT, Bench
from benchmarks.serving import fresh, request, run
from benchmarks.systems import ours
from optimum_lfm2.runtime.threads import single_torch_thread


SYSTEMS = {"fp32": "ours-fp32", "q8": "ours-q8", "q4": "ours-q4"}


def pieces(tokenizer: Any, lengths: tuple[int, int], count: int) -> list[list[int]]:
    """Return the tokens of pieces of a text, of random lengths between two."""
    ids = tokenizer((ROOT / "demo" / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    numbers, first = random.Random(0), [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = []
    for _ in range(count):
        length = numbers.randint(*lengths)
        start = numbers.randrange(len(ids) - length)
        found.append([*first, *ids[start : start + length]])
    return found


def compare(model: Any, prompts: list[list[int]], new: int, rows: int) -> tuple[int, int, int]:
    """Return how many tokens were compared, how many texts differ, and of how many prompts the first token does."""
    columns = max(map(len, prompts)) + new
    scheduler, together = fresh(model, rows, columns), [request(model, ids, new) for ids in prompts]
    run(scheduler, together)
    tokens = texts = first = 0
    for one, ids in zip(together, prompts, strict=True):
        alone = request(model, ids, new)
        run(fresh(model, 1, columns), [alone])
        same = next((i for i, pair in enumerate(zip(one.tokens, alone.tokens, strict=True)) if pair[0] != pair[1]), new)
        tokens += min(same + 1, new)
        texts += same < new
        first += same == 0
    return tokens, texts, first


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path(".benchmarks"), help="folder for the models, kept between runs")
    add("--checkpoint", type=Path, default=ROOT / "demo" / "checkpoint", help="a trained checkpoint")
    add("--texts", type=int, default=128)
    add("--lengths", type=int, nargs=2, default=(8, 200), help="tokens of a prompt, the fewest and the most")
    add("--new", type=int, default=64, help="new tokens of each text")
    add("--rows", type=int, default=8, help="how many run at once")
    add("--precisions", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if (
        min(args.texts, args.new, args.threads, args.lengths[0]) < 1
        or args.rows < 2
        or args.lengths[0] > args.lengths[1]
    ):
        parser.error("--rows must be 2 at least, the others 1, and the fewest tokens not more than the most")

    bench = Bench(args.work / "rounding", args.checkpoint, args.threads, {})
    prompts = pieces(AutoTokenizer.from_pretrained(args.checkpoint), tuple(args.lengths), args.texts)
    print("| | tokens compared | texts that differ | tokens that differ | from the first token on |")
    print("| --- | --- | --- | --- | --- |")
    for name in args.precisions:
        bench.prepare(SYSTEMS[name])
        longest = max(map(len, prompts)) + args.new
        model = ours.System(bench.folder(SYSTEMS[name]), args.threads, longest, name).model
        with single_torch_thread():
            tokens, texts, first = compare(model, prompts, args.new, args.rows)
        share = f"1 in {tokens / texts:.0f}" if texts else "none"
        print(f"| {name} | {tokens} | {texts} of {args.texts} | {share} | {first} |", flush=True)


if __name__ == "__main__":
    main()
