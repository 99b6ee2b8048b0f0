"""Candidates from the text itself: the tokens that followed an earlier occurrence of the last tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from optimum_lfm2.runtime.schedule import Acceptance, best_count


LOOKED_AT = 8  # of the places where the last tokens have stood, the latest
LONGEST = 16  # a match of more tokens says no more
# By the bits of the match's length: 1, 2 to 3, 4 to 7, 8 to 15, 16 tokens. What one can expect of them beforehand.
EXPECTED = (0.1, 0.3, 0.5, 0.7, 0.9)


class Suffixes:
    """A text, and where each of its n-grams ends.

    Args:
        sizes: n-grams of 1 to so many tokens.
    """

    def __init__(self, sizes: int) -> None:
        self.ids: list[int] = []
        self._ends: list[dict[tuple[int, ...], list[int]]] = [{} for _ in range(sizes)]

    def append(self, token: int) -> None:
        """Add a token to the text."""
        self.ids.append(token)
        for size, ends in enumerate(self._ends, 1):
            if len(self.ids) >= size:
                ends.setdefault(tuple(self.ids[-size:]), []).append(len(self.ids))

    def match(self) -> tuple[int, int]:
        """Find the earlier place that agrees longest with the end of the text: what follows it, and for how long.

        Returns:
            The index of the token after the place, and the number of tokens that agree, at most `LONGEST`; 0 for none.
        """
        for size in range(len(self._ends), 0, -1):
            ends = self._ends[size - 1].get(tuple(self.ids[-size:]), [])[-LOOKED_AT - 1 : -1]
            if ends:
                length, end = max((self._agreement(end, size), end) for end in ends)
                return end, length
        return 0, 0

    def _agreement(self, end: int, known: int) -> int:
        ids, last = self.ids, len(self.ids)
        while known < min(end, LONGEST) and ids[end - known - 1] == ids[last - known - 1]:
            known += 1
        return known

    def after(self, place: int, count: int) -> list[int]:
        """Return the tokens after `place`. If these reach the end of the text, they repeat from `place` on."""
        period = len(self.ids) - place
        return [self.ids[place + i % period] for i in range(count)]


class PromptLookup(CandidateGenerator):
    """Replaces transformers' `PromptLookupCandidateGenerator`, and tries only as many candidates as pay.

    As the text goes on, it shows whether a candidate was right, tried or not. So candidates from matches of a length
    that was wrong lately are left out, until such matches would have been right.

    Args:
        most: candidates at most, `prompt_lookup_num_tokens`.
        sizes: the longest n-gram that is looked up, `max_matching_ngram_size`.
        longest: the number of tokens at which the text ends.
        ends: the tokens that end a text.
        stops: tells whether a text stops after some ids, int64 (1, length), by other criteria; None for none.
        pending: tells how many tokens the next call has to run again.
        replays: whether the tokens of a call have to be run again if a candidate of it is wrong.
    """

    def __init__(
        self,
        most: int,
        sizes: int,
        longest: int,
        ends: Collection[int] = (),
        stops: Callable[[torch.Tensor], bool] | None = None,
        pending: Callable[[], int] = lambda: 0,
        replays: bool = False,
    ) -> None:
        self._most, self._longest, self._ends, self._stops = most, longest, frozenset(ends), stops
        self._pending, self._replays = pending, replays
        self._text = Suffixes(sizes)
        self._acceptance = Acceptance(EXPECTED)
        self._guess: list[int] = []  # what was expected after the text
        self._kinds: list[int] = []

    def get_candidates(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Return the ids, (1, length), with candidates after them, and no logits of the candidates.

        The first call gets none: it reads the prompt, and what it would take back could be as long.
        """
        first = not self._text.ids
        new = input_ids[0, len(self._text.ids) :].tolist()
        self._learn(new)
        for token in new:
            self._text.append(token)
        place, length = self._text.match()
        self._guess = self._text.after(place, self._most) if length else []
        self._kinds = [min(length + i, LONGEST).bit_length() - 1 for i in range(len(self._guess))]
        candidates = [] if first else self._worth_a_try(input_ids)
        if not candidates:
            return input_ids, None
        return torch.cat([input_ids, input_ids.new_tensor([candidates])], dim=1), None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Do nothing. The next ids tell which candidates were accepted."""

    def _learn(self, new: list[int]) -> None:
        for kind, expected, token in zip(self._kinds, self._guess, new, strict=False):
            self._acceptance.learn(kind, expected == token)
            if expected != token:
                return

    def _worth_a_try(self, input_ids: torch.Tensor) -> list[int]:
        # The call gives a token more than it has candidates.
        room = max(0, self._longest - input_ids.shape[1] - 1)
        guess = self._guess[:room]
        if ends := [i for i, token in enumerate(guess) if token in self._ends]:
            guess = guess[: ends[0]]
        shares = [self._acceptance.share(kind) for kind in self._kinds[: len(guess)]]
        guess = guess[: best_count(shares, self._pending(), self._replays)]
        if self._stops is None:
            return guess
        for i in range(len(guess)):
            if self._stops(torch.cat([input_ids, input_ids.new_tensor([guess[: i + 1]])], dim=1)):
                return guess[:i]
        return guess
