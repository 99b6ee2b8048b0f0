"""Measure what several tokens in one call are worth: `python -m benchmarks.speculation`.

The model is LFM2-350M's shape in q4, once with the columns of its states and once without. All scenarios run in one
process and take turns, so a slow minute of the machine affects all; ratios are taken within a round.

A text is forced on the model, so that it says what a scenario needs and random weights do: nothing that came before, or
half of the prompt. A drafter that knows the text, and is wrong by a set share, shows the speed for each share.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import CandidateGenerator, GenerationMixin

from benchmarks.bench import Bench, say
from benchmarks.checkpoint import random_checkpoint


SYSTEMS = {"replay": "ours-q4", "columns": "ours-q4-columns"}
SHARES = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
TOKENS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)
TEXTS = ("nothing repeated", "words repeated, not what follows", "half of the prompt copied")
MOST = 10  # candidates, as transformers has it by default
NEVER = 7  # a token that no text has: the candidates of transformers 4.57 need one that ends the text

# What a scenario does, and how many tokens it makes a second, or a call of how many tokens takes how many seconds.
Results = dict[str, list[float]]


class Forced(LogitsProcessor):
    """Makes a model say a text."""

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.text[input_ids.shape[1]]] = torch.finfo(scores.dtype).max
        return scores


class Knowing(CandidateGenerator):
    """Drafts a text that it knows, at no expense. Each candidate is right by a share; as many are tried as pay."""

    def __init__(self, text: list[int], share: float, replays: bool) -> None:
        from optimum_lfm2.runtime.schedule import Acceptance

        self.text, self.share, self.replays = text, share, replays
        self.acceptance, self.tried = Acceptance([0.5]), 0
        self.random = random.Random(0)

    def get_candidates(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        from optimum_lfm2.runtime.schedule import best_count

        length = input_ids.shape[1]
        room = min(MOST, len(self.text) - length - 1)
        right = [self.random.random() < self.share for _ in range(room)]
        wrong = next((i for i, one in enumerate(right) if not one), room)
        for i in range(min(wrong + 1, room)):
            self.acceptance.learn(0, i < wrong)
        count = best_count([self.acceptance.share(0)] * room, 0, self.replays)
        new = [self.text[length + i] if right[i] else self.text[0] for i in range(count)]
        return torch.cat([input_ids, input_ids.new_tensor([new], dtype=torch.int64)], dim=1), None

    def update_candidate_strategy(self, *_: Any) -> None:  # type: ignore[override]
        pass


@dataclass
class Chat:
    """A model, and a prompt that its cache has seen.

    Attributes:
        prompt: ids, none of which comes twice.
        new: how many tokens a text has after the prompt.
    """

    model: Any
    prompt: list[int]
    new: int
    cache: Any = field(init=False)

    def __post_init__(self) -> None:
        from optimum_lfm2 import compat

        ids = torch.tensor([self.prompt[:-1]])
        self.cache = self.model(input_ids=ids, logits_to_keep=1)[compat.CACHE]

    def speed(self, answer: list[int], generator: Any = None, **settings: Any) -> float:
        """Generate the answer, and return tokens a second."""
        # transformers 4.57 writes more than it is asked for where candidates at the end are right.
        text = [*self.prompt, *answer[: self.new], *self.prompt[:1] * (MOST + 1)]
        cache, ids = copy.deepcopy(self.cache), torch.tensor([self.prompt])
        settings |= {"logits_processor": LogitsProcessorList([Forced(text)]), "max_new_tokens": self.new}
        if generator is not None:
            settings["prompt_lookup_num_tokens"] = MOST
            self.model._get_candidate_generator = lambda *args, **kwargs: generator(text, *args, **kwargs)
        started = time.perf_counter()
        try:
            out = self.model.generate(ids, cache=cache, do_sample=False, eos_token_id=NEVER, pad_token_id=0, **settings)
        finally:
            vars(self.model).pop("_get_candidate_generator", None)
        seconds = time.perf_counter() - started
        assert out[0, : len(self.prompt) + self.new].tolist() == text[: -MOST - 1]
        return self.new / seconds

    def seconds(self, tokens: int) -> float:
        """The time of a call of so many tokens."""
        from optimum_lfm2 import compat

        ids = torch.tensor([self.prompt[:tokens]])
        cache = copy.deepcopy(self.cache)
        started = time.perf_counter()
        self.model(input_ids=ids, logits_to_keep=tokens, **{compat.CACHE: cache})
        return time.perf_counter() - started


def scenarios(chats: Mapping[str, Chat], wanted: set[str], vocabulary: int) -> dict[str, Callable[[], float]]:
    """What is measured, by a name. `plain` is first, and is what the others are compared with."""
    chat = chats["columns"]
    once = random.Random(1).sample(sorted(set(range(8, vocabulary)) - set(chat.prompt)), chat.new)
    quarter = len(chat.prompt) // 4
    copied = (chat.prompt[quarter:] * (1 + chat.new // quarter))[: chat.new]
    # Every other token is one of the prompt, and what follows it is another one than there.
    mixed = [
        token for pair in zip(once, random.Random(2).choices(chat.prompt, k=chat.new), strict=True) for token in pair
    ]
    answers = dict(zip(TEXTS, (once, mixed[: chat.new], copied), strict=True))
    lookup = {"prompt_lookup_num_tokens": MOST}

    def theirs(text: list[int], *args: Any, **kwargs: Any) -> Any:
        return GenerationMixin._get_candidate_generator(chat.model, *args, **kwargs)

    def knowing(share: float, way: str) -> Callable[[], float]:
        return lambda: chats[way].speed(once, lambda text, *_, **__: Knowing(text, share, way == "replay"))

    found: dict[str, Callable[[], float]] = {"plain": lambda: chat.speed(once)}
    if "lookup" in wanted:
        for name, answer in answers.items():
            for way, own in chats.items():
                found[f"{name}, {way}"] = lambda own=own, answer=answer: own.speed(answer, **lookup)  # type: ignore[misc]
            found[f"{name}, transformers' candidates"] = lambda answer=answer: chat.speed(answer, theirs)  # type: ignore[misc]
    if "shares" in wanted:
        found |= {f"{share:.0%} right, {way}": knowing(share, way) for share in SHARES for way in chats}
    if "costs" in wanted:
        found |= {f"{tokens} tokens": lambda tokens=tokens: chat.seconds(tokens) for tokens in TOKENS}  # type: ignore[misc]
    return found


def measure(chats: Mapping[str, Chat], wanted: set[str], rounds: int, vocabulary: int) -> Results:
    """Return what each scenario gave in each round. One more round comes first, and is not counted."""
    from optimum_lfm2.runtime.threads import single_torch_thread

    with single_torch_thread():  # as `generate` does
        found = scenarios(chats, wanted, vocabulary)
        results: Results = {name: [] for name in found}
        orders = random.Random(0)
        for number in range(rounds + 1):
            for name, run in orders.sample([*found.items()], len(found)):  # a heavy one slows the next one down
                # A call by itself takes milliseconds: the median of some, as many as fill the time of a short text.
                value = statistics.median(run() for _ in range(9)) if name.endswith("tokens") else run()
                if number:
                    results[name].append(value)
            say(f"round {number} of {rounds}")
    return results


def table(results: Results) -> list[str]:
    """Format the results as the lines of a table: medians, and the ratios within rounds with their quartiles."""
    lines = ["| | tok/s | to plain decoding |", "| --- | --- | --- |"]
    calls = {name: times for name, times in results.items() if name.endswith("tokens")}
    for name, speeds in results.items():
        if name not in calls:
            lines.append(f"| {name} | {statistics.median(speeds):.1f} | {_ratios(speeds, results['plain'])} |")
    if calls:
        lines += ["", "| one call of | ms | to one of 1 token |", "| --- | --- | --- |"]
        for name, times in calls.items():
            lines.append(f"| {name} | {1000 * statistics.median(times):.2f} | {_ratios(times, calls['1 tokens'])} |")
    return lines


def _ratios(own: list[float], others: list[float]) -> str:
    ratios = sorted(a / b for a, b in zip(own, others, strict=True))
    low, middle, high = (ratios[round(q * (len(ratios) - 1))] for q in (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path(".benchmarks"), help="folder for the models, kept between runs")
    add("--checkpoint", type=Path, help="an LFM2 checkpoint instead of the random one")
    add("--scenarios", default="lookup,shares,costs", help="what is measured (default: %(default)s)")
    add("--prompt", type=int, default=512, help="tokens of the prompt")
    add("--new", type=int, default=128, help="new tokens in each turn")
    add("--rounds", type=int, default=8)
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if min(args.prompt, args.new, args.rounds, args.threads) < 1:
        parser.error("--prompt, --new, --rounds and --threads must be 1 at least")

    bench = Bench(args.work, args.checkpoint or random_checkpoint(args.work), args.threads, {})
    prompt = random.Random(0).sample(range(8, bench.vocabulary), args.prompt)
    chats = {}
    for way, system in SYSTEMS.items():
        bench.prepare(system)
        chats[way] = Chat(_load(bench.folder(system), args.threads), prompt, args.new)
    print("\n".join(table(measure(chats, set(args.scenarios.split(",")), args.rounds, bench.vocabulary))))


def _load(folder: Path, threads: int) -> Any:
    import optimum_lfm2  # noqa: F401  before anything of optimum: transformers 5 needs it so

    # isort: split
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTModelForCausalLM

    options = SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ORTModelForCausalLM.from_pretrained(folder, session_options=options)


if __name__ == "__main__":
    main()
