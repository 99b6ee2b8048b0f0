"""Sixteen clients and four hundred requests at once: right ones, wrong ones, some that go away and some that fail."""

from __future__ import annotations

import gc
import http.client
import json
import random
import threading
import time
import weakref
from collections import Counter
from pathlib import Path

import pytest
from checkpoints import prompts
from servers import alone, alone_tokens, post, serving

from optimum_lfm2.runtime.picking import Picker
from optimum_lfm2.runtime.scheduler import Limits, ScheduledRequest
from optimum_lfm2.runtime.session import GraphSession
from optimum_lfm2.serving.manager import TokenStream


CLIENTS, REQUESTS = 16, 400
NEW = (1, 6, 20)  # tokens of an answer
CHATS, LEAST = "/v1/chat/completions", 5  # how many requests of each kind there are at least
END, POISON = 7, "<|fim_suf|>"  # the token that ends an answer, and one that the injected error is about
MEMORY = Path("/proc/self/statm")
WRONG = [
    (b"{", 400),
    (b'{"messages": 3}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": "other"}', 404),
    (b"x" * 2**16, 413),
]
KINDS = {"text": 40, "stream": 40, "cut": 8, "gone": 4, "wrong": 6, "read fails": 4, "step fails": 4, "beams": 3}


class Load:
    """The requests by their numbers, and what came of each."""

    def __init__(self, address: str, loaded) -> None:
        self.address, self._loaded = address, loaded
        self._poison = loaded.tokenizer.convert_tokens_to_ids(POISON)
        self.outcomes: dict[int, str] = {}
        self._golds: dict[str, list[int]] = {}
        self._lock = threading.Lock()
        first = loaded.tokenizer.decode(prompts([70], vocab_size=2000)[0])
        numbers = random.Random(1)
        self.chats = []
        for row in prompts([numbers.choice([2, 9, 30, 60, 150]) for _ in range(12)], vocab_size=2000):
            system = [{"role": "system", "content": first}] if numbers.random() < 0.5 else []
            self.chats.append([*system, {"role": "user", "content": loaded.tokenizer.decode(row)}])
        self.settings: list[dict] = [{}, {"temperature": 1.7, "seed": 5}, {"top_k": 4, "temperature": 1.2, "seed": 6}]

    def plan(self, number: int) -> tuple[str, random.Random]:
        numbers = random.Random(number)
        return numbers.choices(list(KINDS), list(KINDS.values()))[0], numbers

    def gold(self, chat: list[dict], new: int, settings: dict) -> str:
        """What `generate` says to the chat alone."""
        key = json.dumps([chat, settings])
        if key not in self._golds:
            given = {name: value for name, value in settings.items() if name != "seed"}
            sampling = {"do_sample": True, **given} if given.get("temperature") else given
            self._golds[key] = alone_tokens(self._loaded, chat, settings.get("seed", 0), max(NEW), **sampling)
        return self._loaded.tokenizer.decode(self._golds[key][:new], skip_special_tokens=True)

    def asked(self, numbers: random.Random) -> tuple[list[dict], int, dict]:
        return numbers.choice(self.chats), numbers.choice(NEW), numbers.choice(self.settings)

    def run(self, number: int) -> None:
        kind, numbers = self.plan(number)
        chat, new, settings = self.asked(numbers)
        body = {"messages": chat, "max_tokens": new, **settings}
        try:
            found = getattr(self, "_" + kind.replace(" ", "_"))(body, numbers)
        except Exception as error:  # the test says which
            found = f"lost: {type(error).__name__}: {error}"
        with self._lock:
            self.outcomes[number] = found

    def _text(self, body: dict, numbers: random.Random) -> str:
        status, text = post(self.address, CHATS, body)
        return json.loads(text)["choices"][0]["message"]["content"] if status == 200 else text

    def _stream(self, body: dict, numbers: random.Random) -> str:
        status, text = post(self.address, CHATS, {**body, "stream": True})
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        if status != 200 or lines[-1] != "[DONE]":
            return text
        return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1])

    def _endless(self, body: dict, stream: bool) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=120)
        fields = {**body, "stream": stream, "max_tokens": 250, "logit_bias": {str(END): -100}}
        connection.request("POST", CHATS, json.dumps(fields), {"Content-Type": "application/json"})
        return connection

    def _cut(self, body: dict, numbers: random.Random) -> str:
        connection = self._endless(body, stream=True)
        answer = connection.getresponse()
        answer.read(numbers.choice([1, 300]))
        answer.close()
        connection.close()
        return "cut"

    def _gone(self, body: dict, numbers: random.Random) -> str:
        connection = self._endless(body, stream=False)
        time.sleep(numbers.random() / 10)
        connection.close()
        return "gone"

    def _wrong(self, body: dict, numbers: random.Random) -> str:
        wrong, expected = numbers.choice(WRONG)
        status, text = post(self.address, CHATS, wrong)
        return "refused" if status == expected and "error" in json.loads(text) else text

    def _read_fails(self, body: dict, numbers: random.Random) -> str:
        return self._failure({**body, "messages": [{"role": "user", "content": f"No {POISON}."}]})

    def _step_fails(self, body: dict, numbers: random.Random) -> str:
        return self._failure({**body, "max_tokens": 9, "logit_bias": {str(self._poison): 100}})

    def _failure(self, body: dict) -> str:
        status, text = post(self.address, CHATS, body)
        return "failed" if status == 500 and "injected" in text else text

    def _beams(self, body: dict, numbers: random.Random) -> str:
        config = {"num_beams": 2, "eos_token_id": END, "pad_token_id": 0, "do_sample": False}
        plain = {"messages": body["messages"], "max_tokens": body["max_tokens"]}
        return self._text({**plain, "generation_config": json.dumps(config)}, numbers)

    def expected(self, number: int) -> str:
        kind, numbers = self.plan(number)
        chat, new, settings = self.asked(numbers)
        if kind == "beams":
            return alone(self._loaded, chat, new=new, num_beams=2)
        ends = {"cut": "cut", "gone": "gone", "wrong": "refused", "read fails": "failed", "step fails": "failed"}
        return ends.get(kind) or self.gold(chat, new, settings)


@pytest.fixture
def faults(monkeypatch, loaded) -> Counter:
    """The model fails on one token, and now and then for no reason in a call of several rows. Counts both."""
    run, poison, counts = GraphSession.run, loaded.tokenizer.convert_tokens_to_ids(POISON), Counter()

    def failing(self, ids, *args, **kwargs):
        if bool((ids == poison).any()):
            counts["poison"] += 1
            raise RuntimeError("injected")
        counts["calls of several rows"] += len(ids) > 2
        if len(ids) > 2 and counts["calls of several rows"] % 40 == 0:
            counts["passing"] += 1
            raise RuntimeError("injected, and gone the next time")
        return run(self, ids, *args, **kwargs)

    monkeypatch.setattr(GraphSession, "run", failing)
    return counts


@pytest.fixture
def alive(monkeypatch) -> weakref.WeakSet:
    """What was made for a request and is still there."""
    alive: weakref.WeakSet = weakref.WeakSet()

    def noted(create):
        return lambda self, *args, **kwargs: (alive.add(self), create(self, *args, **kwargs))[1]

    for kind in (ScheduledRequest, TokenStream, Picker):
        monkeypatch.setattr(kind, "__init__", noted(kind.__init__))
    return alive


def resident() -> int:
    """Megabytes of memory, or 0 where the system does not say."""
    return int(MEMORY.read_text().split()[1]) * 4096 >> 20 if MEMORY.exists() else 0


def wait_until_idle(scheduler) -> None:
    for _ in range(3000):
        if scheduler.idle:
            return
        time.sleep(0.01)
    pytest.fail("a row runs on")


def test_every_good_request_is_right_and_nothing_stays(loaded, faults, alive):
    threads = set(threading.enumerate())
    limits = Limits(rows=8, tokens=6000, queue=64, cache_memory=2**20)
    with serving(loaded, limits=limits, body=2**15) as (address, state, _):
        load, manager = Load(address, loaded), state.managers["tiny"]
        numbers, sizes = iter(range(REQUESTS)), []
        lock = threading.Lock()

        def client() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                    if number is not None and number % 100 == 0:
                        sizes.append(resident())
                if number is None:
                    return
                load.run(number)

        clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for one in clients:
            one.start()
        for one in clients:
            one.join(240)
        wait_until_idle(manager.engine.scheduler)
        sizes.append(resident())
        kinds = Counter(load.plan(number)[0] for number in range(REQUESTS))
        assert set(kinds) == set(KINDS)
        assert min(kinds.values()) >= LEAST
        assert manager._alone_count == 0
        assert manager.engine.scheduler.prefixes.size <= limits.cache_memory
        gc.collect()
        assert not list(alive)
    assert faults["poison"] >= kinds["read fails"] + kinds["step fails"]
    assert faults["passing"] > 0
    wrong = {
        number: (load.plan(number)[0], load.outcomes.get(number), load.expected(number)) for number in range(REQUESTS)
    }
    # transformers' parser of a whole answer leaves out blanks at its ends.
    assert {number: one for number, one in wrong.items() if (one[1] or "").strip() != one[2].strip()} == {}
    assert sizes[-1] - sizes[1] < 40, sizes  # megabytes of the last 300 requests
    assert set(threading.enumerate()) <= threads
