"""Many clients of `optimum-cli lfm2 serve`: they come, go away, wait, and it ends."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from checkpoints import prompts
from servers import STORY, alone, ask, openai, post, serving, streamed

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.scheduler import QueueFullError, Scheduler
from optimum_lfm2.serving.server import named


def test_many_clients_get_what_each_gets_alone(client, loaded, served):
    texts = [loaded.tokenizer.decode(row) for row in prompts([5, 30, 9, 60, 2, 17, 40, 12], vocab_size=2000)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    golds = [alone(loaded, chat) for chat in chats]
    found: dict[int, str] = {}

    def run(i: int) -> None:
        if i % 2:
            found[i] = streamed(ask(client, chats[i], stream=True))
        else:
            found[i] = ask(client, chats[i]).choices[0].message.content

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(chats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found.get(i) for i in range(len(chats))] == golds


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(stream, served, monkeypatch):
    step = Scheduler.step
    monkeypatch.setattr(
        Scheduler, "step", lambda self: (step(self), time.sleep(0.1))
    )  # a slow machine has time to notice
    address, state, _ = served
    scheduler = state.managers["tiny"].engine.scheduler
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    fields = {"messages": STORY, "max_tokens": 250, "stream": stream, "temperature": 1.5}
    fields["logit_bias"] = {"7": -100}  # it does not end by itself
    connection.request("POST", "/v1/chat/completions", json.dumps(fields), {"Content-Type": "application/json"})
    if stream:
        connection.getresponse().read(100)
    for _ in range(600):
        if scheduler.running:
            break
        time.sleep(0.02)
    assert scheduler.running == 1
    running = scheduler._running[0] if scheduler._running else scheduler._reading[0]
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    for _ in range(1500):
        if running.ended:
            break
        time.sleep(0.02)
    assert running.ended == "cancelled"


def test_a_full_queue_is_503(client, monkeypatch):
    def full(self, request):
        raise QueueFullError("2 requests wait already. Try again later.")

    monkeypatch.setattr(Scheduler, "submit", full)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="2 requests wait") as refused:
            ask(client, stream=stream)
        assert refused.value.status_code == 503


def test_the_end_of_the_server_waits_for_what_runs(loaded):
    before = {thread.name for thread in threading.enumerate()}
    with serving(loaded, key="secret", names=("one", "two")) as (address, state, server):
        fields = {"model": "two", "messages": STORY, "max_tokens": 60, "stream": True}
        assert post(address, "/v1/chat/completions", fields)[0] == 401
        assert post(address, "/health", None, method="GET")[0] == 200
        key = {"Authorization": "Bearer secret"}
        assert post(address, "/v1/chat/completions", {"messages": STORY}, key)[0] == 404  # which of two?
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(fields), {"Content-Type": "application/json", **key}
        )
        answer = connection.getresponse()
        begun = answer.read(10)
        server.should_exit = True
        text = (begun + answer.read()).decode()
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":' in text
        state.managers["two"].stop()
        assert state.managers["two"].engine.scheduler.idle
    assert not state.is_cb_alive()
    assert {thread.name for thread in threading.enumerate()} <= before | {"lfm2-engine"}  # of the other server


def test_the_name_of_a_folder(tmp_path):
    assert named(str(tmp_path / "a" / "lfm2_onnx")) == ("lfm2_onnx", tmp_path / "a" / "lfm2_onnx")
    assert named("small=/models/x") == ("small", Path("/models/x"))
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert named(str(odd)) == ("a=b", odd)
    for wrong in ("small=", "=folder", "=", ""):
        with pytest.raises(Lfm2Error, match="NAME=FOLDER"):
            named(wrong)
