"""Many calls of `generate` on one row without padding, drawn with a seed: every way to go on that a caller has.

Each case must give the tokens and the logits of transformers alone, without a cache.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from optimum_lfm2 import compat


NEW = 6
SETTINGS = {
    "do_sample": False,
    "max_new_tokens": NEW,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}
MASKS: dict[str, Callable[[int], torch.Tensor | None]] = {
    "no mask": lambda length: None,
    "ones": lambda length: torch.ones(1, length, dtype=torch.int64),
    "true": lambda length: torch.ones(1, length, dtype=torch.bool),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@dataclass(frozen=True)
class Expected:
    """What transformers writes after a text, and its logits, float32 (NEW, vocab_size)."""

    tokens: list[int]
    logits: torch.Tensor


@torch.no_grad()
def expected(model: Any, text: torch.Tensor) -> Expected:
    """Ask transformers for the greedy continuation of one row, int64 (length), without a cache."""
    ids = text[None]
    for _ in range(NEW):
        logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return Expected(ids[0, len(text) :].tolist(), logits[0, -NEW:])


@dataclass(frozen=True)
class Turn:
    """A call of `generate` that is drawn, and what it has to give."""

    name: str
    run: Callable[[], Any]
    gold: Expected

    def fault(self) -> str | None:
        """Run it. Return what is wrong, or None."""
        try:
            out = self.run()
        except Exception as error:
            return f"{self.name}: {type(error).__name__}: {error}"
        tokens = out.sequences[0, -NEW:].tolist()
        if tokens != self.gold.tokens:
            return f"{self.name}: {tokens}, not {self.gold.tokens}"
        difference = (torch.cat(out.logits) - self.gold.logits).abs().max().item()
        return f"{self.name}: logits off by {difference}" if difference > 2e-4 else None


def texts(seed: int, count: int, vocab_size: int = 256) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Draw pairs of turns, each int64 (length)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(longest: int) -> torch.Tensor:
        length = int(torch.randint(1, longest, (1,), generator=generator))
        return torch.randint(8, vocab_size, (length,), generator=generator)

    for _ in range(count):
        yield draw(24), draw(13)


def turns(model: Any, gold: Any, first: torch.Tensor, second: torch.Tensor) -> Iterator[Turn]:
    """Every way to run a text, and to go on with another after the answer."""
    answer = expected(gold, first)
    for (named, mask), size, lookup in itertools.product(MASKS.items(), (None, 1, 3, len(first)), (False, True)):
        yield Turn(
            f"first turn of {len(first)}, {named}, chunks of {size}, lookup {lookup}",
            lambda mask=mask, size=size, lookup=lookup: model.generate(
                first[None], attention_mask=mask(len(first)), **_options(size, lookup)
            ),
            answer,
        )
    cache = model.generate(first[None], **SETTINGS)[compat.CACHE]
    chat = torch.cat([first, torch.tensor(answer.tokens), second])
    after = expected(gold, chat)
    for (named, copied), size in itertools.product(COPIES.items(), (None, 2, 5)):
        yield from _continued(model, chat, after, lambda copied=copied: copied(cache), size, named)
    for back in {1, 2, NEW + 1, NEW + len(first) // 2}:
        if back < cache.get_seq_length():
            for size in (None, 2):
                yield from _continued(
                    model, *_cropped(model, gold, first, answer, second, back), size, f"crop({-back})"
                )


def _options(size: int | None, lookup: bool) -> dict[str, Any]:
    return SETTINGS | {"prefill_chunk_size": size} | ({"prompt_lookup_num_tokens": 3} if lookup else {})


def _cropped(
    model: Any, gold: Any, first: torch.Tensor, answer: Expected, second: torch.Tensor, back: int
) -> tuple[torch.Tensor, Expected, Callable[[], Any]]:
    """A chat that leaves the last tokens of its first turn out, and what makes the cache of what stays."""
    seen = torch.cat([first, torch.tensor(answer.tokens[:-1])])
    chat = torch.cat([seen[:-back], second])

    def make() -> Any:
        cache = model._graph.new_cache(1)
        cache.activate_past_recording()
        model.generate(first[None], **SETTINGS, **{compat.CACHE: cache})
        cache.crop(-back)
        return cache

    return chat, expected(gold, chat), make


def _continued(
    model: Any, chat: torch.Tensor, after: Expected, make: Callable[[], Any], size: int | None, name: str
) -> Iterator[Turn]:
    """Go on by the ids of the whole chat, with a mask and without, and by the new ids with the mask of the whole."""
    total = len(chat)
    for (named, mask), part in itertools.product(MASKS.items(), ("all ids", "new ids", "all ids, lookup")):
        if part == "new ids" and named == "no mask":
            continue

        def run(mask=mask, part=part) -> Any:
            cache = make()
            ids = chat[cache.get_seq_length() :] if part == "new ids" else chat
            options = _options(size, part.endswith("lookup"))
            return model.generate(ids[None], attention_mask=mask(total), **options, **{compat.CACHE: cache})

        yield Turn(f"{name}, {part} of {total}, {named}, chunks of {size}", run, after)
