"""Systems side by side: each is loaded in a process of its own, and one chats at a time, in turn.

A turn takes a second or a few, so a slow minute of a shared machine affects all systems alike. Ratios are taken within
a round. Each round has an order of its own: a system may be slower right after a heavy one, and in a fixed order, also
in one that rotates, it would always be the same one. Each round loads all systems anew: where the weights happen to lie
in memory changes the speed of a process, as long as it lives.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.bench import Bench, WorkerError, say


PAUSE = 1.0  # seconds before a turn, in which the machine comes to rest


@dataclass(frozen=True)
class Chat:
    """A prompt of so many tokens, then so many new ones."""

    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.prompt}:{self.new}"

    @classmethod
    def read(cls, text: str) -> Chat:
        """From `512:48`. Raises `ValueError`."""
        prompt, new = map(int, text.split(":"))
        if min(prompt, new) < 1:
            raise ValueError(text)
        return cls(prompt, new)


# By the chat, for each round the tokens a second of prefill and of decode.
Speeds = dict[str, list[tuple[float, float]]]


def take_turns(bench: Bench, names: Sequence[str], chats: Sequence[Chat], rounds: int) -> dict[str, Speeds]:
    """The speeds of each system; one that fails is told of and left out.

    Args:
        names: of systems whose files are made. All of them are loaded at once.
        chats: every round has each of them, for each system.
        rounds: each loads the systems anew. Their first chat, which pages the weights in, does not count.
    """
    speeds: dict[str, Speeds] = {}
    orders = random.Random(0)
    for number in range(rounds):
        with ExitStack() as stack:
            workers = {}
            for name in names:
                if name in bench.errors:
                    continue
                with bench.tolerant(name):
                    workers[name] = stack.enter_context(_worker(bench, name, max(c.prompt + c.new for c in chats)))
                    _chat(workers[name], chats[0])
            for chat in chats:
                for name in shuffled(workers, orders):
                    if name in bench.errors:
                        continue
                    with bench.tolerant(name):
                        result = _chat(workers[name], chat)
                        speeds.setdefault(name, {}).setdefault(str(chat), []).append(result)
        say(f"round {number + 1} of {rounds}")
    return {name: own for name, own in speeds.items() if name not in bench.errors}


def shuffled(names: Iterable[str], orders: random.Random) -> Iterator[str]:
    """Yield the systems in the next order, with a pause before each."""
    every = [*names]
    for name in orders.sample(every, len(every)):
        time.sleep(PAUSE)
        yield name


@contextmanager
def _worker(bench: Bench, name: str, length: int) -> Iterator[subprocess.Popen]:
    """A worker that has loaded its system, with room for `length` tokens, and waits for chats."""
    process = bench.start(name, "serve", length=length)
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def _chat(worker: subprocess.Popen, chat: Chat) -> tuple[float, float]:
    try:
        worker.stdin.write(json.dumps({"prompt": chat.prompt, "new": chat.new}) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # it has died: there is no answer either
    line = worker.stdout.readline()
    if not line:
        raise WorkerError(f"it ended with status {worker.wait()}")
    prefill, decode = json.loads(line)
    return prefill, decode
