"""Which candidates are looked up, and how many are worth a try."""

from __future__ import annotations

import random

import pytest
import torch

from optimum_lfm2.runtime import lookup as lookup_module
from optimum_lfm2.runtime.lookup import PromptLookup, Suffixes
from optimum_lfm2.runtime.schedule import COSTS, Acceptance, best_count, cost


def text_of(ids: list[int], sizes: int = 2) -> Suffixes:
    text = Suffixes(sizes)
    for token in ids:
        text.append(token)
    return text


def test_the_longest_match_is_found_and_the_latest_of_equals():
    text = text_of([1, 2, 3, 10, 5, 2, 3, 11, 1, 2, 3])
    assert text.match() == (3, 3)
    assert text.after(3, 4) == [10, 5, 2, 3]
    assert text_of([4, 3, 10, 5, 3, 11, 6, 3], sizes=1).match() == (5, 1)
    assert text_of([1, 2, 3]).match() == (0, 0)
    assert text_of([1, 2, 1, 2, 1]).after(3, 5) == [2, 1, 2, 1, 2], "a repetition goes on over the end"


def test_a_match_reaches_from_the_first_token_to_sixteen():
    assert text_of([3, 9, 3], sizes=1).match() == (1, 1)
    assert text_of([1, 2, 9, 1, 2]).match() == (2, 2)
    assert text_of([5, 5], sizes=1).match() == (1, 1), "before the first token there is none"
    assert text_of([*range(20), 99, *range(20)]).match() == (20, 16)


@pytest.mark.parametrize(("others", "found"), [(7, (2, 2)), (8, (18, 1))])
def test_the_latest_eight_places_are_looked_at(others, found):
    """The first place agrees longest: `1 5` against `2 5`."""
    assert text_of([1, 5, *[2, 5] * others, 1, 5], sizes=1).match() == found


def play(prompt: list[int], answer: list[int]) -> tuple[int, float]:
    """How many candidates a model that writes the answer is given, and the time by the table of costs."""
    lookup = PromptLookup(10, 2, len(prompt) + len(answer))
    text, tried, time = list(prompt), 0, 0.0
    while len(text) < len(prompt) + len(answer):
        given = lookup.get_candidates(torch.tensor([text]))[0][0, len(text) :].tolist()
        tried += len(given)
        time += cost(1 + len(given))
        right = answer[len(text) - len(prompt) :]
        accepted = next((i for i, token in enumerate(given) if token != right[i]), len(given))
        text += right[: accepted + 1]
    assert text == prompt + answer
    return tried, time


def test_a_text_that_repeats_nothing_costs_nothing():
    order = list(range(600))
    random.Random(0).shuffle(order)
    assert play(order[:300], order[300:]) == (0, 300.0)


def test_a_text_whose_words_come_again_in_other_order_costs_little():
    """Bigrams that come again, and are followed by something else: after a few trials no candidate is tried."""
    choose = random.Random(0)
    pairs = [(2 * i, 2 * i + 1) for i in range(30)]
    text = [token for _ in range(300) for token in (*choose.choice(pairs), choose.randrange(100, 1000))]
    tried, time = play(text[:450], text[450:])
    assert tried > 0, "the second of a pair is worth a try"
    assert time < 450


def test_an_answer_that_copies_half_of_the_prompt():
    order = list(range(600))
    random.Random(0).shuffle(order)
    _, time = play(order[:512], order[100:356])
    assert time < 256 / 2.5


def test_what_was_wrong_comes_back_when_it_is_right_again():
    acceptance = Acceptance([0.5])
    for _ in range(8):
        acceptance.learn(0, False)
    assert best_count([acceptance.share(0)] * 10, 0, False) == 0
    for _ in range(8):
        acceptance.learn(0, True)
    assert best_count([acceptance.share(0)] * 10, 0, False) >= 3


def test_candidates_end_before_the_text_does(monkeypatch):
    monkeypatch.setattr(lookup_module, "EXPECTED", (1.0,) * 5)
    words = [5, 6, 7, 8, 9, 10, 11, 5, 6, 7]

    def given(**options) -> list[int]:
        lookup = PromptLookup(3, 3, **{"longest": 100, **options})
        lookup.get_candidates(torch.tensor([words[:-1]]))
        return lookup.get_candidates(torch.tensor([words]))[0][0, 10:].tolist()

    assert given() == [8, 9, 10]
    assert given(longest=13) == [8, 9]
    assert given(longest=11) == []
    assert given(ends=[9]) == [8]
    assert given(stops=lambda ids: bool((ids[0] == 10).sum() > 1)) == [8, 9]
    assert given(stops=lambda ids: False) == [8, 9, 10]
    # The kind of a candidate is by the length of the match before it: 2 and 3 are of one kind, 4 to 7 of the next.
    monkeypatch.setattr(lookup_module, "EXPECTED", (1.0, 1.0, 0.0, 0.0, 0.0))
    assert given() == [8]


def test_what_is_learned_of_candidates():
    """Each right one, and the first wrong one: what comes after it has other words before it."""
    lookup, learned = PromptLookup(4, 3, 100), []
    lookup._acceptance.learn = lambda kind, right: learned.append((kind, right))
    text = [5, 6, 7, 8, 9, 10, 11, 5, 6, 7]
    for new in ([], [8, 9, 1, 11]):
        text += new
        lookup.get_candidates(torch.tensor([text]))
    assert learned == [(1, True), (2, True), (2, False)]


def test_the_first_call_gets_none():
    assert PromptLookup(3, 2, 100).get_candidates(torch.tensor([[5, 6, 5, 6]]))[0].tolist() == [[5, 6, 5, 6]]


def test_shares_forget_a_tenth_with_each_outcome():
    acceptance = Acceptance([0.5, 0.1])
    assert (acceptance.share(0), acceptance.share(1)) == (0.5, 0.1)
    acceptance.learn(0, True)
    assert acceptance.share(0) == pytest.approx((0.9 * 1 + 1) / (0.9 * 2 + 1))
    acceptance.learn(0, False)
    assert acceptance.share(0) == pytest.approx(0.9 * 1.9 / (0.9 * 2.8 + 1))
    assert acceptance.share(1) == 0.1


@pytest.mark.parametrize(
    ("shares", "pending", "replays", "least", "count"),
    [
        # tokens / cost > 1.05 / cost without candidates, solved by hand for the share of the last candidate
        ([], 0, False, 0.155, 1),  # (1 + s) / 1.1 > 1.05
        ([], 1, False, 0.394, 1),  # (1 + s) / 1.46 > 1.05 / 1.1
        ([1.0], 0, False, 0.655, 2),  # (2 + s) / 1.46 > 2 / 1.1
        # with 1.3 / 8 for each token that is run again
        ([], 0, True, 0.278, 1),  # (1 + s) / (1.1 + 0.1625 (1 - s)) > 1.05
        ([], 1, True, 0.537, 1),  # (1 + s) / (1.46 + 2 * 0.1625 (1 - s)) > 1.05 / 1.1
        ([1.0], 0, True, 0.783, 2),  # (2 + s) / (1.46 + 2 * 0.1625 (1 - s)) > 2 / 1.1
        ([0.8], 0, True, 0.812, 2),  # (1.8 + 0.8 s) / (1.4925 + 0.8 * 2 * 0.1625 (1 - s)) > 1.8 / 1.1325
    ],
)
def test_a_candidate_is_tried_from_the_share_on_at_which_it_pays(shares, pending, replays, least, count):
    assert best_count([*shares, least + 0.005], pending, replays) == count
    assert best_count([*shares, least - 0.005], pending, replays) == count - 1


def test_counts_follow_the_cost_of_a_call():
    assert [cost(tokens) for tokens in (7, 10, 24)] == pytest.approx([2.15, 2.7, 5.325])
    assert cost(1) == 1
    assert [cost(tokens) for tokens, _ in COSTS] == [time for _, time in COSTS]
    assert cost(64) == 2 * cost(32)
    assert best_count([0.1] * 10, 0, False) == 0
    assert 1 <= best_count([0.6] * 10, 0, False) <= 4
    assert best_count([0.98] * 10, 0, False) == 10
    assert best_count([0.25], 0, False) == 1
    assert best_count([0.25], 0, True) == 0, "what stays would be run again"
