"""Requests that share calls get the tokens that each gets alone, whoever comes, goes, fails or waits beside them."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from checkpoints import gold_tokens, prompts
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime import scheduler as scheduler_module
from optimum_lfm2.runtime.engine import Engine, StoppedError
from optimum_lfm2.runtime.picking import Picker, can_share
from optimum_lfm2.runtime.scheduler import Limits, QueueFullError, ScheduledRequest, Scheduler, can_schedule
from optimum_lfm2.runtime.session import GraphSession


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(scheduler_module, "PREFILL_CHUNK", 24)
    monkeypatch.setattr(scheduler_module, "CHUNK_BESIDE_OTHERS", 8)


@pytest.fixture
def load(exported):
    """`load(name)` gives an export whose settings name no end token."""

    def load(name: str) -> ORTModelForCausalLM:
        model = ORTModelForCausalLM.from_pretrained(exported(name))
        model.generation_config = GenerationConfig(pad_token_id=0)
        return model

    return load


def make(model: ORTModelForCausalLM, graph: GraphSession | None = None, **limits: int) -> Scheduler:
    return Scheduler(graph or model._graph, model.layout, model.device, Limits(**limits))


def ask(model: ORTModelForCausalLM, ids: torch.Tensor, new: int = 12, seed: int = 0, **settings) -> ScheduledRequest:
    config = GenerationConfig(**{**GREEDY, "max_new_tokens": new, **settings})
    return ScheduledRequest(ids, Picker(model, ids, config, seed=seed))


def finish(scheduler: Scheduler, *requests: ScheduledRequest, most: int = 2000) -> None:
    for request in requests:
        scheduler.submit(request)
    for _ in range(most):
        if scheduler.idle:
            return
        scheduler.step()
    pytest.fail("the scheduler does not come to an end")


# Tokens


@pytest.mark.parametrize("name", ["hybrid", "all_conv", "all_attention", "lfm3", "granite_rope_and_biases", "olmo"])
def test_rows_that_come_and_go_get_what_they_get_alone(name, load, gold_model):
    model, lengths, new = load(name), [9, 70, 1, 31, 150, 5, 2, 40], [30, 12, 20, 5, 16, 1, 40, 9]
    rows = prompts(lengths)
    golds = [gold_tokens(gold_model(name), row, count) for row, count in zip(rows, new, strict=True)]
    scheduler = make(model, rows=4)
    requests = [ask(model, row, count) for row, count in zip(rows, new, strict=True)]
    lengths_seen, together = set(), 0
    for step in range(400):
        if step % 5 == 0 and step // 5 < len(requests):
            scheduler.submit(requests[step // 5])
        scheduler.step()
        together = max(together, len(scheduler._running))
        lengths_seen.add((scheduler._rows.length, len(scheduler._running)))
    assert [request.tokens for request in requests] == golds
    assert {request.ended for request in requests} == {"length"}
    assert together == 4
    assert scheduler._rows.capacity == scheduler._rows.length == 0  # nothing is held while nothing runs


def test_columns_left_of_all_rows_are_given_up(load, gold_model):
    model = load("hybrid")
    long, short = prompts([300, 6])
    scheduler = make(model, rows=2)
    requests = ask(model, long, 3), ask(model, short, 40)
    for request in requests:
        scheduler.submit(request)
    seen = []
    while not scheduler.idle:
        scheduler.step()
        seen.append(scheduler._rows.length)
    assert max(seen) >= 300
    assert seen[-2] < 50
    assert requests[1].tokens == gold_tokens(gold_model("hybrid"), short, 40)


SETTINGS: dict[str, dict] = {
    "greedy": {},
    "temperature": {"do_sample": True, "temperature": 1.7},
    "top k": {"do_sample": True, "top_k": 3},
    "top p": {"do_sample": True, "top_p": 0.6, "top_k": 0},
    "min p": {"do_sample": True, "min_p": 0.2, "temperature": 0.7},
    "penalty": {"repetition_penalty": 2.5},
    "both": {"do_sample": True, "repetition_penalty": 1.3, "top_p": 0.9},
    "at least": {"min_new_tokens": 9, "eos_token_id": list(range(200))},
    "no three twice": {"no_repeat_ngram_size": 3, "bad_words_ids": [[5]]},
    "bias": {"sequence_bias": [[[9], 5.0], [[11], -2.0]]},
}


def test_each_row_has_settings_of_its_own(load, gold_model):
    """The gold is transformers' own generate, one row with a seed."""
    model, gold = load("hybrid"), gold_model("hybrid")
    rows = prompts([7, 20, 3, 33, 12, 9, 5, 18, 26, 4])
    requests, golds = [], []
    for seed, (row, settings) in enumerate(zip(rows, SETTINGS.values(), strict=True)):
        requests.append(ask(model, row, 16, seed, **settings))
        torch.manual_seed(seed)
        out = gold.generate(row[None], use_cache=False, max_new_tokens=16, **{**GREEDY, **settings})
        golds.append(out[0, len(row) :].tolist())
    finish(make(model, rows=6), *requests)
    found = {name: request.tokens for name, request in zip(SETTINGS, requests, strict=True)}
    assert found == dict(zip(SETTINGS, golds, strict=True))
    assert requests[7].ended == "stop"
    greedy = [gold_tokens(gold, row, 16) for row in rows]
    assert sum(one != two for one, two in zip(greedy, golds, strict=True)) >= 8


@pytest.mark.parametrize("stop", ["fox", " was", "to the", ["\n", "Once"], "e", ", and", "nowhere in it"])
def test_stop_strings_end_a_row_where_transformers_ends_it(stop, load, exported, gold_model):
    model, tokenizer = load("trained"), AutoTokenizer.from_pretrained(exported("trained"))
    ids = tokenizer("Once upon a time there was a fox", return_tensors="pt")["input_ids"]
    settings = GREEDY | {"max_new_tokens": 40, "stop_strings": stop}
    gold = gold_model("trained").generate(ids, use_cache=False, tokenizer=tokenizer, **settings)[0, ids.shape[1] :]
    request = ScheduledRequest(ids[0], Picker(model, ids[0], GenerationConfig(**settings), tokenizer))
    finish(make(model), request)
    assert request.tokens == gold.tolist()
    assert request.ended == ("length" if len(gold) == 40 else "stop")


def test_what_needs_calls_of_its_own():
    assert can_share(GenerationConfig())
    assert can_share(GenerationConfig(do_sample=True, top_p=0.3))
    for settings in (
        {"num_beams": 2},
        {"guidance_scale": 1.5},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"max_time": 1.0},
        {"use_cache": False},
    ):
        assert not can_share(GenerationConfig(**settings)), settings


def test_graphs_of_other_exporters_are_told(load):
    import dataclasses

    layout = load("hybrid").layout
    assert can_schedule(layout)
    assert not can_schedule(dataclasses.replace(layout, any_padding=False))
    assert not can_schedule(dataclasses.replace(layout, in_place=False))


# Prefixes


class Counting:
    """A session that notes what it is given to read."""

    def __init__(self, graph: GraphSession) -> None:
        self._graph, self.read, self.rows = graph, 0, []

    def __getattr__(self, name: str):
        return getattr(self._graph, name)

    def run(self, ids, mask, cache, keep, io_binding):
        if ids.shape[1] > 1 or mask.shape[1] == ids.shape[1]:
            self.read += ids.shape[1]
        self.rows.append(len(ids))
        return self._graph.run(ids, mask, cache, keep, io_binding)


@pytest.mark.parametrize("name", ["hybrid", "lfm3", "all_conv", "granite_rope_and_biases"])
def test_a_second_turn_reads_its_own_tokens(name, load, gold_model):
    model = load(name)
    graph = Counting(model._graph)
    scheduler = make(model, graph)
    first, more = prompts([60, 7])
    request = ask(model, first, 10)
    finish(scheduler, request)
    second = torch.cat([first, torch.tensor(request.tokens), more])
    graph.read = 0
    again = ask(model, second, 20)
    finish(scheduler, again)
    assert again.cached == 69
    assert graph.read == 8
    assert again.tokens == gold_tokens(gold_model(name), second, 20)


def test_a_common_beginning_is_read_once(load, gold_model):
    """The second prompt parts from the first within it. The third then goes on from there, and so do later ones."""
    model = load("hybrid")
    graph = Counting(model._graph)
    scheduler = make(model, graph)
    common, *ends = prompts([83, 40, 41, 42, 43])
    texts = [torch.cat([common, end]) for end in ends]
    requests = [ask(model, text, 6) for text in texts]
    for request in requests[:3]:
        finish(scheduler, request)
    assert requests[0].cached == 0
    assert 0 < requests[1].cached <= 83  # at a point that costs little, before the texts part
    assert requests[2].cached == 83
    finish(scheduler, requests[3])
    assert requests[3].cached == 83
    for text, request in zip(texts, requests, strict=True):
        assert request.tokens == gold_tokens(gold_model("hybrid"), text, 6)


def test_the_same_prompt_twice(load):
    model = load("hybrid")
    (ids,) = prompts([30])
    scheduler = make(model)
    first, second = ask(model, ids, 8), ask(model, ids, 8)
    finish(scheduler, first)
    finish(scheduler, second)
    assert first.tokens == second.tokens
    assert second.cached < 30
    assert len(scheduler.prefixes) == 1


def test_memory_of_prefixes_is_bounded_and_the_oldest_goes_first(load):
    model = load("hybrid")
    rows = prompts([50, 50, 50, 50])

    def cached(memory: int, *order: int) -> list[int]:
        scheduler = make(model, cache_memory=memory)
        found = []
        for i in order:
            request = ask(model, rows[i], 2)
            finish(scheduler, request)
            found.append(request.cached)
            assert scheduler.prefixes.size <= memory
        return found

    whole = make(model, cache_memory=2**30)
    finish(whole, ask(model, rows[0], 2))
    one = whole.prefixes.size
    assert one > 50 * 2 * 2 * 2 * 16 * 4  # keys and values of two layers
    first = cached(2**30, 0, 1, 2, 0)
    assert first[:3] == [0, 0, 0]
    assert first[3] > 0
    assert cached(2 * one, 0, 1, 2, 0)[3] == 0
    two = int(2.7 * one)  # a text that is read again gets a point more
    assert cached(two, 0, 1, 0, 2, 0)[4] > 0
    assert cached(two, 0, 1, 0, 2, 1)[4] == 0
    assert cached(0, 0, 0) == [0, 0]
    assert cached(one // 2, 0, 0)[1] == 0


# Limits


def test_rows_wait_until_they_fit(load, gold_model):
    model = load("hybrid")
    graph = Counting(model._graph)
    rows = prompts([10] * 6)
    requests = [ask(model, row, 10) for row in rows]
    scheduler = make(model, graph, rows=8, tokens=60)
    finish(scheduler, *requests)
    assert max(graph.rows) == 3  # of 20 columns each
    golds = [gold_tokens(gold_model("hybrid"), row, 10) for row in rows]
    assert [request.tokens for request in requests] == golds


def test_what_never_fits_and_a_full_queue_are_refused(load):
    model = load("hybrid")
    (ids,) = prompts([30])
    scheduler = make(model, tokens=40, queue=2)
    with pytest.raises(Lfm2Error, match=r"The prompt has 30 tokens and asks for 11 more; .* 40"):
        scheduler.submit(ask(model, ids, 11))
    with pytest.raises(Lfm2Error, match="empty"):
        scheduler.submit(ask(model, ids[:0], 5))
    for _ in range(2):
        scheduler.submit(ask(model, ids, 5))
    with pytest.raises(QueueFullError, match="2 requests wait"):
        scheduler.submit(ask(model, ids, 5))
    finish(scheduler)
    scheduler.submit(ask(model, ids, 5))


@pytest.mark.parametrize("steps", [0, 2, 9])
def test_who_goes_away_frees_the_row_at_once(steps, load, gold_model):
    model = load("hybrid")
    rows = prompts([40, 6, 9])
    requests = [ask(model, row, 14) for row in rows]
    scheduler = make(model, rows=2)
    for request in (requests[1], requests[0], requests[2]):
        scheduler.submit(request)
    for _ in range(steps):
        scheduler.step()
    requests[0].cancel()
    scheduler.step()
    assert requests[0].ended == "cancelled"
    finish(scheduler)
    for i in (1, 2):
        assert requests[i].tokens == gold_tokens(gold_model("hybrid"), rows[i], 14)
    assert requests[0].tokens == gold_tokens(gold_model("hybrid"), rows[0], 14)[: len(requests[0].tokens)]


# Failures


class Poisoned(Counting):
    """A session whose calls fail where one of the tokens is among them."""

    def __init__(self, graph: GraphSession, token: int) -> None:
        super().__init__(graph)
        self._token = token

    def run(self, ids, mask, cache, keep, io_binding):
        if bool((ids == self._token).any()):
            raise RuntimeError("injected")
        return super().run(ids, mask, cache, keep, io_binding)


def test_a_row_that_fails_touches_no_other(load, gold_model):
    """In the middle of a shared call, and while a prompt is read."""
    model = load("hybrid")
    rows = prompts([12, 25, 7])
    golds = [gold_tokens(gold_model("hybrid"), row, 20) for row in rows]
    others = {token for i in (0, 2) for token in (*golds[i], *rows[i].tolist())}
    place, token = next((i, t) for i, t in enumerate(golds[1]) if i > 3 and t not in others | {*rows[1].tolist()})
    place = golds[1].index(token)
    requests = [ask(model, row, 20) for row in rows]
    poisoned = ask(model, torch.tensor([11, token, 12]), 5)
    finish(make(model, Poisoned(model._graph, token)), *requests, poisoned)
    assert [requests[i].tokens for i in (0, 2)] == [golds[i] for i in (0, 2)]
    for request in (requests[1], poisoned):
        assert request.ended == "failed"
        assert str(request.error) == "injected"
    assert requests[1].tokens == golds[1][: place + 1]


def test_a_row_whose_numbers_break_harms_no_later_row(load, gold_model):
    """A column that is hidden has to be finite, or it hurts whoever gets the row's memory next."""
    model = load("hybrid")
    bad, good, later = prompts([20, 9, 30])
    scheduler = make(model, rows=2)
    requests = ask(model, bad, 30), ask(model, good, 30), ask(model, later, 12)
    scheduler.submit(requests[0])
    scheduler.submit(requests[1])
    for _ in range(8):
        scheduler.step()
    rows = scheduler._rows
    for tensor in rows._full.values():
        tensor[scheduler._running.index(requests[0])] = float("nan")
    requests[0].cancel()
    finish(scheduler, requests[2])
    for request, ids in zip(requests[1:], (good, later), strict=True):
        assert request.tokens == gold_tokens(gold_model("hybrid"), ids, len(request.tokens))


def test_what_a_caller_raises_is_its_own(load, gold_model):
    model = load("hybrid")
    rows = prompts([12, 8, 7])

    def fail(*_: object) -> None:
        raise OSError("gone")

    requests = [ask(model, row, 10) for row in rows]
    requests[0]._on_token = requests[1]._on_end = fail
    ended = []
    requests[2]._on_end = lambda: ended.append(requests[2].ended)
    finish(make(model), *requests)
    assert requests[0].ended == "failed"
    assert isinstance(requests[0].error, OSError)
    assert requests[1].ended == "length"
    assert requests[2].tokens == gold_tokens(gold_model("hybrid"), rows[2], 10)
    assert ended == ["length"]


# The thread


def test_many_threads_ask_at_once(load, gold_model):
    model = load("hybrid")
    engine = Engine(make(model, rows=4))
    rows = prompts([4 + 3 * i for i in range(8)])
    requests = [ask(model, row, 12) for row in rows]
    done = [threading.Event() for _ in rows]
    for request, event in zip(requests, done, strict=True):
        request._on_end = event.set
    askers = [threading.Thread(target=engine.submit, args=(request,)) for request in requests]
    for asker in askers:
        asker.start()
    assert all(event.wait(60) for event in done)
    golds = [gold_tokens(gold_model("hybrid"), row, 12) for row in rows]
    assert [request.tokens for request in requests] == golds
    engine.stop()
    assert not engine.alive
    assert not engine._thread.is_alive()
    with pytest.raises(StoppedError, match="shutting down"):
        engine.submit(requests[0])


@pytest.mark.parametrize("finishing", [True, False])
def test_the_end_of_the_thread(finishing, load):
    model = load("hybrid")
    engine = Engine(make(model, rows=2))
    requests = [ask(model, row, 40) for row in prompts([5, 6, 7])]
    begun = threading.Event()
    requests[0]._on_token = lambda _: begun.set()
    for request in requests:
        engine.submit(request)
    assert begun.wait(60)
    engine.stop(finish=finishing)
    assert {request.ended for request in requests} == ({"length"} if finishing else {"cancelled"})


def test_a_failure_of_the_scheduler_itself_ends_what_runs_and_not_the_thread(load, monkeypatch):
    model = load("hybrid")
    scheduler = make(model)
    engine, (ids,) = Engine(scheduler), prompts([5])
    ended = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(scheduler, "_admit", lambda: np.zeros(1)[2])
        request = ask(model, ids, 4)
        request._on_end = ended.set
        engine.submit(request)
        assert ended.wait(60)
        assert request.ended == "failed"
    again, ended = ask(model, ids, 4), threading.Event()
    again._on_end = ended.set
    engine.submit(again)
    assert ended.wait(60)
    assert again.ended == "length"
    engine.stop()
