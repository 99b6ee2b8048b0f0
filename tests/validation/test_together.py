"""Forwards that run together: each weight is read once, and each forward computes what it computes alone."""

from __future__ import annotations

import threading
from collections import Counter
from contextvars import ContextVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_lfm2.validation.streamed import StandIns
from optimum_lfm2.validation.together import run_together
from optimum_lfm2.weights.blocks import SCHEMES
from optimum_lfm2.weights.checkpoint import tied_names


class Counted(dict):
    """Weights that count how often each is read."""

    def __init__(self, model) -> None:
        super().__init__(model.state_dict())
        self.reads: Counter = Counter()

    def __getitem__(self, name):
        self.reads[name] += 1
        return super().__getitem__(name)


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint("hybrid")).eval()


def test_each_weight_is_read_once_and_each_forward_is_as_if_alone(model):
    rows = [torch.tensor([[1, 5, 9, 30]]), torch.tensor([[7, 2]]), torch.tensor([[40, 41, 42]])]
    with torch.no_grad():
        gold = [model(row, use_cache=False).logits for row in rows]
    weights, found = Counted(model), {}
    seen = ContextVar("seen")
    inside = []
    hook = model.base_model.layers[1].operator_norm.register_forward_hook(lambda *_: inside.append(seen.get()))

    def job(number: int):
        def run() -> None:
            seen.set(number)
            found[number] = model(rows[number], use_cache=False).logits

        return run

    before = torch.get_num_threads(), threading.active_count()
    run_together(model, StandIns(model, weights, None), [job(number) for number in range(3)])
    hook.remove()
    for number, logits in enumerate(gold):
        torch.testing.assert_close(found[number], logits, rtol=1e-4, atol=1e-5)
    assert inside == [0, 1, 2]  # a hook within a unit knows whose forward it is
    assert set(weights.reads.values()) == {1}
    assert set(weights.reads) == set(tied_names(model).values())
    assert before == (torch.get_num_threads(), threading.active_count())


def test_a_forward_that_fails_ends_all(model):
    def fails() -> None:
        model(torch.tensor([[1, 2]]), use_cache=False)
        raise KeyError("its own")

    jobs = [lambda: model(torch.tensor([[3]]), use_cache=False), fails]
    before = threading.active_count()
    with pytest.raises(KeyError, match="its own"):
        run_together(model, StandIns(model, model.state_dict(), None), jobs)
    assert threading.active_count() == before
    assert "forward" not in vars(model.base_model.layers[0])


def test_whether_there_is_a_weight_is_told_without_reading_it(model):
    weights = Counted(model)
    values = StandIns(model, weights, SCHEMES["q4"])
    assert "lm_head.weight" in values
    assert "no.weight" not in values
    assert not weights.reads
