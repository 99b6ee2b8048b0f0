"""The benchmarks on a tiny checkpoint: every job runs, our systems agree with transformers, the pages are written."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    chunks,
    encoders,
    experts,
    graph_turns,
    kv_cache_bits,
    lfm3_vision,
    outside,
    prefixes,
    quantization,
    report,
    rounding,
    run,
    servers,
    serving,
    serving_rounding,
    speculation,
    turns,
    vision,
    windows,
    worker,
)
from benchmarks.bench import Bench
from benchmarks.checkpoint import add_tokenizer
from benchmarks.systems import SYSTEMS
from optimum_lfm2 import compat
from optimum_lfm2.runtime import rows
from optimum_lfm2.runtime.session import GraphSession
from optimum_lfm2.weights.blocks import Blocks


pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
OPTIONS = ["--rounds", "2", "--loads", "1", "--threads", "1", "--chats", "16:4", "40:3", "--quality", "2"]
PAGES = ("README.md", "docs/performance.md")
NAMES = ["ours-fp32", "loop-fp32", "ours-q4", "transformers-fp32"]


@pytest.fixture(scope="module", autouse=True)
def no_pauses():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "PAUSE", 0)
        yield


@pytest.fixture(scope="module")
def results(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    places = ["--checkpoint", str(checkpoint("hybrid")), "--work", str(folder / "work"), "--out", str(folder / "out")]
    run.main([*places, *OPTIONS, "--long-prompt", "48", "--systems", ",".join(NAMES)])
    return folder / "out" / "results.json"


def test_every_system_is_measured(results):
    measured = json.loads(results.read_text())
    assert not measured["errors"]
    assert sorted(measured["systems"]) == sorted(NAMES)
    for system in measured["systems"].values():
        (load,) = system["loads"]
        assert len(load["tokens"]) == 5
        assert load["peak"] > load["libraries"] > 0
        assert min(load["load"], system["size"]) > 0
        assert set(system["speeds"]) == {"16:4", "40:3"}
        assert all(len(rounds) == 2 and min(map(min, rounds)) > 0 for rounds in system["speeds"].values())
    assert measured["long_prompt"]["tokens"] == 48
    assert list(measured["long_prompt"]["systems"]) == ["ours-q4"]
    assert "A prompt of 48 tokens adds" in results.with_name("table.md").read_text()


def test_quality_is_measured_beside_speed(results):
    """Of the demo checkpoint: float is transformers', 4 bits are near it and not the same."""
    systems = json.loads(results.read_text())["systems"]
    assert systems["transformers-fp32"]["divergence"] == 0
    assert 0 <= systems["ours-fp32"]["divergence"] < 1e-6
    assert 1e-4 < systems["ours-q4"]["divergence"] < 0.02
    assert "divergence" not in systems["loop-fp32"], "the same files as ours"


def test_float_systems_agree(results):
    systems = json.loads(results.read_text())["systems"]
    gold = systems["transformers-fp32"]["loads"][0]["tokens"]
    assert systems["ours-fp32"]["loads"][0]["tokens"] == systems["loop-fp32"]["loads"][0]["tokens"] == gold
    assert "ours-fp32 5, loop-fp32 5." in results.with_name("table.md").read_text()


@pytest.fixture
def pages(tmp_path) -> Path:
    """A repository's root with the pages that a report goes into."""
    for page in PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return tmp_path


def test_the_table_goes_between_the_marks(results, pages, capsys):
    report.publish(results, pages)
    readme, text = ((pages / page).read_text() for page in PAGES)
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "\nold\n" not in text
    rows = [line for line in text.splitlines() if line.startswith(("| optimum-lfm2", "| transformers"))]
    assert len(rows) == 2 * len(NAMES)
    assert "\nold\n" in readme, "this run has not all systems of its table"
    assert "README.md stays as it is" in capsys.readouterr().out


def test_readme_has_a_row_of_each_of_its_systems(results, pages):
    measured = json.loads(results.read_text())
    systems = measured["systems"]
    systems["ours-genai-q4"] = systems["llama-q4_0"] = systems["ours-q4"]
    (pages / "results.json").write_text(json.dumps(measured))
    report.publish(pages / "results.json", pages)
    text = (pages / "README.md").read_text()
    assert "\nold\n" not in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[5:-3]]
    assert [row[1] for row in rows] == ["q4, blocks of 128"] * 3 + ["fp32, sdpa"]
    prefill, decode = zip(*systems["ours-q4"]["speeds"]["16:4"], strict=True)
    peak = systems["ours-q4"]["loads"][0]["peak"] / 1e6
    assert rows[0][2:] == [f"{value:.0f}" for value in (statistics.median(prefill), statistics.median(decode), peak)]


@pytest.mark.parametrize("page", PAGES)
def test_the_page_has_the_marks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.index(report.BEGIN) < text.index(report.END)


def test_ratios_are_taken_within_a_round():
    """A slow round slows both: the ratio does not move."""

    def system(*speeds: float) -> dict:
        return {"speeds": {"16:4": [(speed * 10, speed) for speed in speeds]}}

    fast, slow = system(20, 40, 60, 2, 30), system(10, 20, 20, 1, 10)
    assert report.ratios(fast, slow, "16:4", report.DECODE) == (2.0, 2.0, 3.0)
    assert report.ratios(fast, slow, "16:4", report.PREFILL) == (2.0, 2.0, 3.0)
    assert report.ratios(slow, slow, "16:4", report.DECODE) == (1.0, 1.0, 1.0)


def test_graphs_in_turns(exported, monkeypatch, capsys):
    """Each graph is loaded first once, and in each round all have a turn."""
    files = [exported("hybrid", **options) / "model.onnx" for options in ({}, {"_variant": "q4"})]
    loaded: list[Path] = []
    real = graph_turns.Graph.__init__
    monkeypatch.setattr(graph_turns.Graph, "__init__", lambda self, *args: loaded.append(args[0]) or real(self, *args))
    options = ["--rounds", "2", "--steps", "1", "--prefill-rounds", "1", "--prompt", "8", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["graph_turns", *map(str, files), *options])
    graph_turns.main()
    assert loaded == [files[0], files[1], files[1], files[0]]
    decode, *rows = capsys.readouterr().out.splitlines()
    assert decode.startswith("decode, 4 rounds")
    first, second, prefill, *_ = rows
    assert first.split()[3:] == ["1.000", "(1.000", "to", "1.000)"], "the first is what the others are measured by"
    assert min(float(second.split()[1]), float(second.split()[3])) > 0
    assert prefill.startswith("prefill, 2 rounds")


def test_a_system_that_dies_is_left_out(checkpoint, tmp_path, capsys):
    """It has no files, so its worker ends before it answers."""
    bench = Bench(tmp_path / "work", checkpoint("hybrid"), 1, {})
    assert turns.take_turns(bench, ["loop-q4"], [turns.Chat(4, 2)], rounds=1) == {}
    assert "loop-q4 left out: it ended with status 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--systems", "ours-q5"], "no system ours-q5"),
        (["--python", "numpy=/bin/sh"], "no package numpy"),
        (["--python", "openvino-genai=/nowhere"], "/nowhere is no Python"),
        (["--rounds", "0"], "must be 1 at least"),
        (["--chats", "512"], "512 is not PROMPT:NEW"),
        (["--chats", "512:0"], "512:0 is not PROMPT:NEW"),
        (["--layers", "4"], "of --shape lfm2-8b-a1b"),
        (["--shape", "lfm2-8b-a1b", "--checkpoint", "x"], "leave --shape out"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        run.arguments(options)
    assert message in capsys.readouterr().err


def test_a_package_that_is_missing_is_left_out(checkpoint, tmp_path, capsys):
    """The given interpreter has no packages: no system is measured, and each one is reported."""
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    places = [
        "--checkpoint",
        str(checkpoint("hybrid")),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "out"),
    ]
    run.main([*places, "--systems", "llama-q4_0", "--python", f"llama-cpp-python={empty}", "--long-prompt", "0"])
    assert "llama-q4_0 left out: llama-cpp-python is not installed" in capsys.readouterr().err


def test_without_a_gpu_cuda_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "benchmarks.cuda"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("No CUDA here")
    assert done.stderr.count("\n") == 1


def test_every_system_has_its_module():
    for name, entry in SYSTEMS.items():
        assert (ROOT / "benchmarks" / "systems" / f"{entry.module}.py").is_file(), name


def test_speed_of_experts(monkeypatch, capsys):
    monkeypatch.setattr(experts, "EXPERTS", 8)
    monkeypatch.setattr(experts, "HIDDEN", 128)
    monkeypatch.setattr(experts, "WIDTH", 256)
    monkeypatch.setattr(sys, "argv", ["experts", "--threads", "1", "--rounds", "1"])
    experts.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == len(experts.LAYERS) + 2
    assert all(float(row[-2]) > 0 for row in rows)


def test_ways_to_quantise():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for method in quantization.METHODS.values():
        back = quantization._by_blocks(weight, Blocks(4, 32), method)
        assert 0.001 < (back - weight).pow(2).mean() / weight.pow(2).mean() < 0.015


def test_speed_of_block_sizes(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantization, "SIZES", (32,))
    add_tokenizer(shutil.copytree(checkpoint("hybrid"), tmp_path / "lfm2-350m"))
    quantization.speed(tmp_path, rounds=1, threads=1)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [[cell.strip() for cell in row[:3]] for row in rows] == [
        ["4", "32", "4 bits"],
        ["4", "128", "4 bits, blocks of 32"],
        ["4", "32", "8 bits"],
        ["8", "32", "8 bits"],
    ]
    assert all(float(cell) > 0 for row in rows for cell in row[3:5])


def test_headroom_of_a_cache(monkeypatch, capsys):
    monkeypatch.setattr(quantization, "HEADROOMS", (0.5, 1.25))
    quantization.cache(chunks=4)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    divergences = [float(row[2].split("±")[0]) for row in rows]
    assert [row[0].strip() for row in rows] == ["default", "default", "q8", "q8", "q4", "q4"]
    for clipped, with_room in zip(divergences[::2], divergences[1::2], strict=True):
        assert clipped > 3 * with_room > 0


@pytest.mark.skipif("lfm3" in compat.STAND_INS, reason="this transformers has no lfm3")
def test_a_layers_time_by_the_tokens_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "KINDS", ("sliding_attention",))
    narrow = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    found = windows.times(tmp_path, [8, 40], rounds=2, threads=1, chunk=4, head_dim=16, sliding_window=4, **narrow)
    calls = {call: (kind, times) for call, kind, times in found}
    tokens = ["one token after 8", "one token after 40", "4 tokens after 8", "4 tokens after 40", "40 tokens at once"]
    assert list(calls) == tokens
    for kind, times in calls.values():
        assert kind == "sliding_attention"
        assert len(times) == 2
        assert min(times) > 0


def test_both_caches_in_turn(tmp_path, capsys):
    options = ["--lengths", "8", "40", "--rounds", "2", "--new", "2", "--threads", "1"]
    kv_cache_bits.main(["--checkpoint", str(ROOT / "demo" / "checkpoint"), "--work", str(tmp_path), *options])
    rows = cells(capsys.readouterr().out.splitlines()[-4:])
    assert [row[:2] for row in rows] == [["float", "8"], ["8 bits", "8"], ["float", "40"], ["8 bits", "40"]]
    assert all(float(row[2].split()[0]) > 0 for row in rows)


def cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_table_of_both_caches_has_medians_over_rounds():
    seconds = {
        ("float", 8): [0.01, 0.02, 0.04],
        ("8 bits", 8): [0.02, 0.02, 0.02],
        ("float", 40): [0.04, 0.04, 0.04],
        ("8 bits", 40): [0.04, 0.02, 0.01],
    }
    assert cells(kv_cache_bits.table(seconds, 8)[2:]) == [
        ["float", "8", "50.0 [25.0 to 100.0]", "1.00", "1.00"],
        ["8 bits", "8", "50.0 [50.0 to 50.0]", "1.00", "1.00"],
        ["float", "40", "25.0 [25.0 to 25.0]", "0.50", "1.00"],
        ["8 bits", "40", "50.0 [25.0 to 100.0]", "1.00", "2.00"],
    ]


def test_texts_of_candidates_right_and_wrong(tmp_path, capsys, monkeypatch):
    """Every text is checked as it is measured."""
    monkeypatch.setattr(speculation, "SHARES", (0.0, 0.8))
    monkeypatch.setattr(speculation, "TOKENS", (1, 2))
    options = ["--prompt", "48", "--new", "12", "--rounds", "1", "--threads", "1"]
    speculation.main(["--checkpoint", str(ROOT / "demo" / "checkpoint"), "--work", str(tmp_path), *options])
    rows = cells([line for line in capsys.readouterr().out.splitlines() if line.startswith("|")])
    assert [row[0] for row in rows[2:]] == [
        "plain",
        *(f"{text}, {way}" for text in speculation.TEXTS for way in ("replay", "columns", "transformers' candidates")),
        *(f"{share} right, {way}" for share in ("0%", "80%") for way in ("replay", "columns")),
        "one call of",
        "---",
        "1 tokens",
        "2 tokens",
    ]


def test_rounding_of_several_tokens(tmp_path, capsys, monkeypatch):
    """In fp32 there is next to none; in q4 it is there, and less than that of the quantisation."""
    monkeypatch.setattr(rounding, "SYSTEMS", ("ours-fp32", "ours-q4"))
    rounding.main(["--work", str(tmp_path), "--chunks", "1", "--length", "32", "--tokens", "4"])
    float_, four = cells(capsys.readouterr().out.splitlines()[2:])
    assert float(float_[2]) < 1e-6
    assert float_[4] == "0 of 1"
    assert 0 <= float(four[2]) < float(four[1])


def test_prefixes(checkpoint, tmp_path, capsys):
    """A longer prefix makes a larger file, and every cell has its median between its lowest and highest figure."""
    options = ["--prefixes", "16", "500", "--rounds", "3", "--threads", "1"]
    prefixes.main(["--checkpoint", str(checkpoint("hybrid")), "--work", str(tmp_path), *options])
    short, long = cells(capsys.readouterr().out.splitlines()[2:])
    assert (short[0], long[0]) == ("16", "500")
    assert float(short[5]) < float(long[5])
    for cell in short[1:5] + long[1:5]:
        middle, low, high = map(float, re.findall(r"[\d.]+", cell))
        assert 0 < low <= middle <= high


def test_the_time_outside_of_the_session(checkpoint, tmp_path, capsys):
    options = ["--prompt", "16", "--new", "6", "--rounds", "2", "--threads", "1"]
    outside.main(["--checkpoint", str(checkpoint("hybrid")), "--work", str(tmp_path), *options])
    tokens, single = (cells(table.splitlines()[2:]) for table in capsys.readouterr().out.split("\n\n"))
    assert [row[0] for row in tokens] == ["`generate()`", "bare session loop"]
    assert all(float(row[2]) < float(row[1]) for row in tokens)
    assert 0 <= float(tokens[1][2]) < float(tokens[0][2])  # a tiny model's bare loop may take under 0.005 ms
    assert len(single) == 6
    assert all(float(cell) >= 0 for row in single for cell in row[1:])


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


def test_a_job_may_say_how_long_chunks_are(exported, monkeypatch):
    lengths, run_ = [], GraphSession.run
    monkeypatch.setattr(
        GraphSession, "run", lambda self, ids, *rest: lengths.append(ids.shape[1]) or run_(self, ids, *rest)
    )
    monkeypatch.setattr(rows, "PREFILL_CHUNK", 512)  # the job changes it, and monkeypatch restores it
    folder = str(exported("hybrid", _variant="q4"))
    job = {"system": "ours-q4", "folder": folder, "threads": 1, "vocabulary": 256, "prompt": 20, "new": 1}
    for chunk, calls in ((8, [8, 8, 4, 1]), (32, [20, 1])):
        lengths.clear()
        assert worker.memory(job | {"chunk": chunk})["prefill"] > 0
        assert lengths[-len(calls) :] == calls


def test_the_table_of_chunks_has_medians(checkpoint, tmp_path, monkeypatch, capsys):
    speeds = {(8, 20): [3, 1, 2], (8, 40): [4, 4, 4], (32, 40): [9, 5, 8]}
    answers = {key: [{"prefill": speed, "added": 1e6 * speed} for speed in values] for key, values in speeds.items()}
    monkeypatch.setattr(Bench, "prepare", lambda self, name: None)
    monkeypatch.setattr(Bench, "job", lambda self, name, job, chunk, prompt, **_: answers[chunk, prompt].pop(0))
    options = ["--sizes", "8", "32", "--prompts", "20", "40", "--rounds", "3"]
    chunks.main(["--checkpoint", str(checkpoint("hybrid")), "--work", str(tmp_path), *options])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 8 | 20 | 2 [1 to 3] | 2 |",
        "| 8 | 40 | 4 [4 to 4] | 4 |",
        "| 32 | 40 | 8 [5 to 9] | 8 |",
    ]


def test_encoders(tmp_path, capsys):
    systems = "torch,ours-fp32,ours-q8"
    with_library = importlib.util.find_spec("sentence_transformers") is not None
    systems += ",st-torch,st-fp32,st-q8" if with_library else ""
    shape = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "block_multiple_of": 8}
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    options = ["--systems", systems, "--tokens", "16", "--rows", "2", "--rounds", "2", "--threads", "1"]
    encoders.main(["--work", str(tmp_path), *options], **shape, **layers)
    rows = [line for line in capsys.readouterr().out.splitlines() if "tokens" not in line and "---" not in line]
    assert [row.split()[1] for row in rows if row.startswith("|")] == systems.split(",")
    vectors = {
        name: torch.as_tensor(encoders.load(name, encoders.prepare(tmp_path), 16, 1)(["Nora", "a key"]))
        for name in systems.split(",")
        if "q8" not in name
    }
    for name, own in vectors.items():
        own = torch.nn.functional.normalize(own, dim=1)
        gold = torch.nn.functional.normalize(vectors["torch"], dim=1)
        torch.testing.assert_close(own, gold, atol=1e-4, rtol=0, msg=name)


def test_a_picture(tmp_path, capsys):
    """Every system is measured, those in float32 generate the same tokens, and a ratio is of a system to the first."""
    text = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "block_multiple_of": 8}
    text |= {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_attention_heads": 4}
    tower = {
        **vision.TOWER,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    options = ["--side", "64", "--words", "6", "--new", "3", "--rounds", "2", "--threads", "1"]
    shape = {"text_config": {**text, "num_key_value_heads": 2}, "vision_config": tower, "projector_hidden_size": 40}
    with_genai = importlib.util.find_spec("onnxruntime_genai") is not None
    names = [name for name in vision.SYSTEMS if with_genai or name != vision.GENAI]
    vision.main(["--work", str(tmp_path), "--systems", ",".join(names), *options], **shape)
    rows = cells(capsys.readouterr().out.splitlines()[-len(names) :])
    assert [row[0] for row in rows] == names
    assert min(float(row[3]) for row in rows) > 0
    assert min(float(row[1]) for row in rows if row[0] != vision.GENAI) > 0
    tokens = [vision.load(name, tmp_path, 1, 64, 6).generate(8).tolist() for name in ("transformers", "ours-fp32")]
    assert tokens[0] == tokens[1]


def test_ratios_of_pictures_are_taken_within_a_round():
    slow = [vision.Turn(2, 4, 0.1), vision.Turn(4, 8, 0.2), vision.Turn(6, 9, 0.4)]
    fast = [vision.Turn(1, 2, 0.05), vision.Turn(2, 2, 0.1), vision.Turn(3, 3, 0.1)]
    assert cells(vision.table({"slow": slow, "fast": fast}).splitlines()[2:]) == [
        ["slow", "4", "1.00 (1.00 to 1.00)", "8", "1.00 (1.00 to 1.00)", "5.0", "1.00 (1.00 to 1.00)"],
        ["fast", "2", "2.00 (2.00 to 2.00)", "2", "3.00 (2.50 to 3.50)", "10.0", "2.00 (2.00 to 3.00)"],
    ]


@pytest.mark.skipif("lfm3_vl" in compat.STAND_INS, reason="this transformers has no lfm3_vl")
def test_the_encoder_of_lfm3_vl(tmp_path, capsys):
    tower = {"hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 8}
    lfm3_vision.main(["--work", str(tmp_path), "--side", "64", "--rounds", "2", "--threads", "1"], **tower)
    rows = cells(capsys.readouterr().out.splitlines()[2:])
    assert [row[0] for row in rows] == ["transformers", "ours-fp32"]
    assert min(float(row[1]) for row in rows) > 0
