"""How much calls of several tokens differ from calls of one: `python -m benchmarks.rounding`.

onnxruntime's kernels of quantised weights round otherwise for several rows than for one. The trained checkpoint of this
repository reads its held-out text token by token, then several tokens a call. The KL divergence between the two stands
beside that of the precision itself, from the float weights. Then it goes on from prompts of the text, with and without
candidates from the prompt, and the tokens that differ are counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import Bench, say
from benchmarks.quality import CHECKPOINT, read_chunks


SYSTEMS = ("ours-fp32", "ours-q8", "ours-q4")


def read(model: Any, ids: list[int], tokens: int) -> torch.Tensor:
    """The log-probabilities after each of the ids, (length, vocabulary) in float64, read in calls of `tokens`."""
    from optimum_lfm2 import compat

    cache, logits = None, []
    for start in range(0, len(ids), tokens):
        out = model(input_ids=torch.tensor([ids[start : start + tokens]]), **{compat.CACHE: cache})
        cache = out[compat.CACHE]
        logits.append(out.logits[0].double())
    return torch.cat(logits).log_softmax(-1)


def divergence(gold: torch.Tensor, own: torch.Tensor) -> float:
    """The mean KL divergence of `own` from `gold`, in nats a token."""
    return float((gold.exp() * (gold - own)).sum(-1).mean())


def changed(model: Any, prompts: Sequence[list[int]], new: int) -> tuple[int, int]:
    """How many texts differ with candidates from the prompt, and how many of their tokens up to the first that does."""
    texts = first = 0
    settings = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    for prompt in prompts:
        ids = torch.tensor([prompt])
        plain, assisted = (model.generate(ids, **settings, **way)[0] for way in ({}, {"prompt_lookup_num_tokens": 10}))
        different = (plain != assisted).nonzero()
        texts += bool(len(different))
        first += int(different[0]) + 1 - len(prompt) if len(different) else new
    return texts, first


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path(".benchmarks/rounding"), help="folder for the models, kept between runs")
    add("--chunks", type=int, default=16, help="of the text that are read")
    add("--length", type=int, default=256, help="tokens of a chunk; the first half is the prompt of a text")
    add("--tokens", type=int, nargs="+", default=[2, 4, 8], help="of a call")
    args = parser.parse_args(argv)

    chunks = read_chunks(args.chunks, args.length)
    bench = Bench(args.work, CHECKPOINT, 1, {})
    gold: list[torch.Tensor] = []
    calls = " | ".join(f"{tokens} tokens a call" for tokens in args.tokens)
    print(f"| | of the precision | {calls} | other top token | texts that differ | tokens before |")
    print("| --- " * (len(args.tokens) + 5) + "|")
    for name in SYSTEMS:
        bench.prepare(name)
        model = _load(bench.folder(name))
        single = [read(model, ids, 1) for ids in chunks]
        gold = gold or single  # float weights come first
        several = [[read(model, ids, tokens) for ids in chunks] for tokens in args.tokens]
        flips = max(
            sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in zip(single, own, strict=True)) for own in several
        )
        mean = [_mean(single, own) for own in several]
        texts, before = changed(model, [ids[: args.length // 2] for ids in chunks], args.length // 2)
        print(
            f"| {name.removeprefix('ours-')} | {_mean(gold, single):.6f} | "
            + " | ".join(f"{value:.6f}" for value in mean)
            + f" | {flips} of {args.chunks * args.length} | {texts} of {len(chunks)} | {before} |"
        )
        say(name)


def _mean(gold: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> float:
    return sum(divergence(a, b) for a, b in zip(gold, own, strict=True)) / len(gold)


def _load(folder: Path) -> Any:
    import optimum_lfm2  # noqa: F401  before anything of optimum: transformers 5 needs it so

    # isort: split
    from optimum.onnxruntime import ORTModelForCausalLM

    return ORTModelForCausalLM.from_pretrained(folder)


if __name__ == "__main__":
    main()
