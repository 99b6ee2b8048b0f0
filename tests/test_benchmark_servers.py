"""Benchmarks of shared calls and of servers beside each other."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from tables import cells

from benchmarks import (
    servers,
    serving,
    serving_rounding,
)
from benchmarks.bench import Bench
from optimum_lfm2.runtime.session import GraphSession


pytestmark = [pytest.mark.once, pytest.mark.usefixtures("no_pauses")]

ROOT = Path(__file__).parent.parent
SERVER = """
import http.server, json, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"{}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(len(body["prompt"]) / 20000)
        if body.get("stream"):
            texts = [{"choices": [{"text": text}]} for text in ("", "a", "b")]
            self.answer("".join(f"data: {json.dumps(text)}\\n\\n" for text in texts).encode() + b"data: [DONE]\\n\\n")
        else:
            self.answer(json.dumps({"usage": {"completion_tokens": body["max_tokens"] - 1}}).encode())

    def answer(self, data):
        self.send_response(200 if sys.argv[2] == "right" else 400)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def prepared(exported, monkeypatch):
    """Benchmarks find an export of the trained model in the place of what they would make."""
    monkeypatch.setattr(Bench, "prepare", lambda self, name: None)
    monkeypatch.setattr(Bench, "folder", lambda self, name: exported("trained"))
    return ["--checkpoint", str(ROOT / "demo" / "checkpoint"), "--threads", "1"]


def test_what_requests_gain_by_sharing_calls(prepared, tmp_path, capsys):
    options = ["--clients", "3", "--prompt", "12", "--new", "6", "--turn", "300", "--rounds", "2"]
    serving.main([*prepared, "--work", str(tmp_path), *options])
    gains, turns_, step = (cells(table.splitlines()[2:]) for table in capsys.readouterr().out.split("\n\n"))
    assert [row[0] for row in gains] == ["together", "one after the other", "times as fast"]
    assert [row[0] for row in turns_] == ["first turn", "second turn", "of the first"]
    for _, cell in (*gains, *turns_, *step):
        middle, low, high = map(float, re.findall(r"[\d.]+(?:e[+-]\d+)?", cell))
        assert 0 < low <= middle <= high
    first, second = (float(row[1].split()[0]) for row in turns_[:2])
    assert second < first, "the second turn reads its own tokens alone"


def test_how_often_a_shared_call_gives_another_token(prepared, tmp_path, capsys, monkeypatch):
    options = ["--texts", "5", "--lengths", "4", "40", "--new", "9", "--rows", "3", "--precisions", "fp32"]
    serving_rounding.main([*prepared, "--work", str(tmp_path), *options])
    ((name, tokens, texts, share, first),) = cells(capsys.readouterr().out.splitlines()[2:])
    assert (name, int(tokens), texts, share, first) == ("fp32", 45, "0 of 5", "none", "0")
    call = GraphSession.run

    def rounds(self, ids, *rest):
        logits = call(self, ids, *rest)
        return logits.flip(-1) if len(ids) > 2 else logits

    monkeypatch.setattr(GraphSession, "run", rounds)
    serving_rounding.main([*prepared, "--work", str(tmp_path), *options])
    ((_, tokens, texts, share, first),) = cells(capsys.readouterr().out.splitlines()[2:])
    assert int(tokens) < 45
    assert int(texts.split()[0]) > 1
    assert share == f"1 in {int(tokens) / int(texts.split()[0]):.0f}"
    assert first == "0"


def test_servers_beside_each_other(tmp_path, capsys):
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    ours, broken = (f"{name}={sys.executable} {script} {{port}} {name}" for name in ("right", "broken"))
    options = ["--tokenizer", str(ROOT / "demo" / "checkpoint"), "--clients", "3", "--prompt", "20", "--new", "5"]
    servers.main([ours, "gone=false {port}", *options, "--turn", "400", "--rounds", "2", "--patience", "20"])
    out, err = capsys.readouterr()
    assert "gone left out: gone does not start" in err
    ((name, *figures),) = cells(out.splitlines()[2:])
    assert name == "right"
    for cell in figures:
        middle, low, high = map(float, re.findall(r"[\d.]+(?:e[+-]\d+)?", cell))
        assert 0 < low <= middle <= high
    with pytest.raises(SystemExit, match="No server could be measured"):
        servers.main([broken, *options, "--patience", "1"])
    assert "broken left out" in capsys.readouterr().err
