"""How many candidates are worth a try, by what was accepted lately and by what a call costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


# The time of a call by its number of tokens, in calls of one token: LFM2-350M's shape in q4, a cache of 512 tokens, two
# threads. Weights in more bits cost less for each further token. It is a table and no clock, so that a seed gives the
# same text again where kernels round by the number of tokens.
COSTS = ((1, 1.0), (2, 1.1), (3, 1.46), (4, 1.6), (5, 1.75), (6, 2.0), (8, 2.3), (12, 3.1), (16, 3.9), (32, 6.75))

GAIN = 1.05  # what candidates must promise over a call without any
FORGET = 0.9  # what an outcome counts after the next one of its kind


def cost(tokens: int) -> float:
    """The time of a call of so many tokens, in calls of one token."""
    for (few, low), (many, high) in pairwise(COSTS):
        if tokens <= many:
            return low + (high - low) * (tokens - few) / (many - few)
    return COSTS[-1][1] * tokens / COSTS[-1][0]


class Acceptance:
    """How often candidates of a kind were right lately.

    Args:
        kinds: for each kind of candidate, the share that is expected before any outcome is known.
    """

    def __init__(self, kinds: Sequence[float]) -> None:
        self._right = [2 * share for share in kinds]
        self._tried = [2.0] * len(kinds)

    def learn(self, kind: int, right: bool) -> None:
        """Take the outcome of a candidate: one that was tried, or one that could have been."""
        self._right[kind] = FORGET * self._right[kind] + right
        self._tried[kind] = FORGET * self._tried[kind] + 1

    def share(self, kind: int) -> float:
        """The expected share of right ones."""
        return self._right[kind] / self._tried[kind]


def best_count(shares: Sequence[float], pending: int, replays: bool) -> int:
    """How many candidates to try, from 0 to all.

    Args:
        shares: for each candidate in order, how likely it is right if those before it are.
        pending: tokens that the next call has to run again.
        replays: whether the tokens of a call have to be run again if a candidate of it is wrong.
    """
    best, count = GAIN / cost(1 + pending), 0
    tokens, likely, again = 1.0, 1.0, 0.0
    step = cost(8) / 8 - cost(1) / 8  # of a further token
    for k, share in enumerate(shares, 1):
        again += likely * (1 - share) * step * (pending + k)  # this one is the first wrong one: k tokens stay
        likely *= share
        tokens += likely
        rate = tokens / (cost(1 + pending + k) + (again if replays else 0))
        if rate > best:
            best, count = rate, k
    return count
