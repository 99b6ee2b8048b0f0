r"""Servers of the OpenAI API beside each other, over HTTP: `python -m benchmarks.servers NAME=COMMAND ...`.

Each server is started by its command, in which `{port}` stands for a free port. In each round every server is asked the
same: several clients at once, one client alone, and a chat of two turns, the first of many tokens. Prompts are words of
the vocabulary, sent to `/v1/completions`. A server that ends an answer early is counted by the tokens that it says it
wrote. Figures are medians, with the lowest and the highest.

  python -m benchmarks.servers --tokenizer M \
      "ours=optimum-cli lfm2 serve M_onnx --port {port}" \
      "torch=transformers serve M --device cpu --port {port}" \
      "llama.cpp=python -m benchmarks.llama_server M M.gguf --port {port}"
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from transformers import AutoTokenizer

from benchmarks.bench import say


class ServerError(RuntimeError):
    """A server that does not start, or that refuses."""


class Server:
    """A server that runs.

    Args:
        name: what the table calls it.
        port: where it listens on this machine.
        model: the model's name in requests, or None.
        seconds: how long an answer may take.
    """

    def __init__(self, name: str, port: int, model: str | None, seconds: float) -> None:
        self.name, self._port, self._seconds = name, port, seconds
        self._fields = {} if model is None else {"model": model}

    def _post(self, body: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._seconds)
        text = json.dumps({**self._fields, "temperature": 0, **body})
        connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ServerError(f"{self.name}: {answer.status} {answer.read().decode()[:300]}")
        return answer

    def write(self, prompt: str, new: int) -> int:
        """Ask for an answer, and return how many tokens it has."""
        return json.loads(self._post({"prompt": prompt, "max_tokens": new}).read())["usage"]["completion_tokens"]

    def first_token(self, prompt: str, new: int) -> tuple[float, str]:
        """Return the seconds to the first text of a stream, and the whole answer."""
        started, first, text = time.perf_counter(), 0.0, ""
        answer = self._post({"prompt": prompt, "max_tokens": new, "stream": True})
        for line in answer:
            data = line.decode().strip().removeprefix("data: ")
            if not data.startswith("{"):
                continue
            event = json.loads(data)
            if "choices" not in event:
                raise ServerError(f"{self.name}: {data[:300]}")
            text += event["choices"][0].get("text") or "" if event["choices"] else ""
            first = first or (time.perf_counter() - started if text else 0.0)
        if not first:
            raise ServerError(f"{self.name}: the stream has no text.")
        return first, text


@contextmanager
def running(name: str, command: str, model: str | None, patience: float, log: IO[bytes]) -> Iterator[Server]:
    """Start a server, wait until it listens, and end it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(command.replace("{port}", str(port)))
    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        until = time.monotonic() + patience
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > until:
                log.seek(0)
                end = log.read().decode(errors="replace").strip().splitlines()[-8:]
                raise ServerError(f"{name} does not start:\n" + "\n".join(end))
            time.sleep(0.2)
        yield Server(name, port, model, patience)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _listens(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def at_once(server: Server, prompts: list[str], new: int) -> float:
    """Tokens a second of one client for each prompt, all at once."""
    counts: list[int] = []
    failures: list[Exception] = []

    def client(prompt: str) -> None:
        try:
            counts.append(server.write(prompt, new))
        except Exception as error:  # raised below, in the main thread
            failures.append(error)

    threads = [threading.Thread(target=client, args=(prompt,)) for prompt in prompts]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sum(counts) / (time.perf_counter() - started)


def measure(server: Server, text: Any, args: argparse.Namespace) -> tuple[float, ...]:
    """One round of a server. Prompts are new ones each time, so that none was read before."""
    shared = at_once(server, [text(args.prompt) for _ in range(args.clients)], args.new)
    alone = at_once(server, [text(args.prompt)], args.new)
    opening = text(args.turn)
    first, answer = server.first_token(opening, 16)
    again, _ = server.first_token(f"{opening}{answer} {text(32)}", 16)
    return shared, alone, shared / alone, 1000 * first, 1000 * again, again / first


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("servers", nargs="+", metavar="NAME=COMMAND")
    add("--tokenizer", required=True, help="folder of the model's tokenizer, to make prompts of a known length")
    add("--model", help="the model's name in requests; by default --tokenizer for transformers' server")
    add("--clients", type=int, default=8)
    add("--prompt", type=int, default=128, help="tokens of a client's prompt")
    add("--new", type=int, default=128, help="new tokens of each request")
    add("--turn", type=int, default=2000, help="tokens of a chat's first turn")
    add("--rounds", type=int, default=5)
    add("--patience", type=float, default=600, help="seconds for a server to start, and for an answer")
    args = parser.parse_args(argv)
    if min(args.clients, args.prompt, args.new, args.turn, args.rounds) < 1:
        parser.error("--clients, --prompt, --new, --turn and --rounds must be 1 at least")
    commands = dict(one.partition("=")[::2] for one in args.servers)
    if not all(commands.values()):
        parser.error("a server is NAME=COMMAND")

    tokenizer, numbers = AutoTokenizer.from_pretrained(args.tokenizer), random.Random(0)
    words = [
        text for i in range(len(tokenizer)) if (text := tokenizer.decode([i])).strip().isalpha() and text[0] == " "
    ]

    def text(length: int) -> str:
        return "".join(numbers.choices(words, k=length)).strip()

    found: dict[str, list[tuple[float, ...]]] = {}
    with ExitStack() as stack:
        servers = []
        for name, command in commands.items():
            log = stack.enter_context(tempfile.TemporaryFile())
            model = args.model or (args.tokenizer if "transformers serve" in command else None)
            try:
                servers.append(stack.enter_context(running(name, command, model, args.patience, log)))
            except (ServerError, OSError) as error:
                say(f"{name} left out: {error}")
        for number in range(args.rounds + 1):  # the first one does not count
            for server in list(servers):
                try:
                    figures = measure(server, text, args)
                except (ServerError, OSError) as error:
                    say(f"{server.name} left out: {error}")
                    servers.remove(server)
                    found.pop(server.name, None)
                    continue
                if number:
                    found.setdefault(server.name, []).append(figures)
    print(f"| | {args.clients} together, tok/s | one, tok/s | times as fast | turn 1, ms | turn 2, ms | of the first |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, rounds in found.items():
        print(f"| {name} | " + " | ".join(_spread(values) for values in zip(*rounds, strict=True)) + " |")
    if not found:
        sys.exit("No server could be measured.")


def _spread(values: Any) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g} to {max(values):.3g}]"


if __name__ == "__main__":
    main()
