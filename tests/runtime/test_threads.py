"""torch's thread count: one while anybody generates, and afterwards what it was, in every thread."""

from __future__ import annotations

import threading

import pytest
import torch
from checkpoints import gold_tokens, prompts
from optimum.onnxruntime import ORTModelForCausalLM

from optimum_lfm2.runtime.threads import single_torch_thread


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_restored_after_an_exception_and_when_nested():
    with pytest.raises(KeyError), single_torch_thread():
        assert torch.get_num_threads() == 1
        with single_torch_thread():
            assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2


def test_users_that_overlap():
    """The second enters while the first holds torch to one, and leaves last; a bystander keeps both threads."""
    entered, leave = threading.Event(), threading.Event()
    counts: dict[str, int] = {}

    def second() -> None:
        with single_torch_thread():
            entered.set()
            leave.wait(10)
            counts["inside"] = torch.get_num_threads()
        counts["after"] = torch.get_num_threads()

    with single_torch_thread():
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait(10)
        bystander = threading.Thread(target=lambda: counts.update(bystander=torch.get_num_threads()))
        bystander.start()
        bystander.join()
    counts["first"] = torch.get_num_threads()
    leave.set()
    thread.join()
    assert counts == {"bystander": 2, "first": 2, "inside": 1, "after": 2}
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [2]


def test_two_models_in_two_threads(exported, gold_model):
    models = [ORTModelForCausalLM.from_pretrained(exported("hybrid")) for _ in range(2)]
    rows = prompts([9, 5])
    out: dict[int, list[int]] = {}

    def generate(i: int) -> None:
        tokens = models[i].generate(
            rows[i][None], do_sample=False, max_new_tokens=32, eos_token_id=None, pad_token_id=0
        )
        out[i] = tokens[0, len(rows[i]) :].tolist()

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [out[i] for i in range(2)] == [gold_tokens(gold_model("hybrid"), row, 32) for row in rows]
    assert torch.get_num_threads() == 2


def test_generate_holds_them_and_gives_them_back(exported, monkeypatch):
    model = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
    seen, run = [], model._rows.run
    monkeypatch.setattr(model._rows, "run", lambda *args: (seen.append(torch.get_num_threads()), run(*args))[1])
    model.generate(prompts([9])[0][None], max_new_tokens=4)
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(model._rows, "run", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(prompts([9])[0][None], max_new_tokens=4)
    assert torch.get_num_threads() == 2
