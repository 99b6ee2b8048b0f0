"""Benchmarks of parts on tiny checkpoints: graphs in turns, caches, chunks, experts, rounding, prefixes."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from tables import cells

from benchmarks import (
    chunks,
    experts,
    graph_turns,
    kv_cache_bits,
    outside,
    prefixes,
    quantization,
    rounding,
    speculation,
    windows,
    worker,
)
from benchmarks.bench import Bench
from benchmarks.checkpoint import add_tokenizer
from optimum_lfm2 import compat
from optimum_lfm2.runtime import rows
from optimum_lfm2.runtime.session import GraphSession
from optimum_lfm2.weights.blocks import Blocks


pytestmark = [pytest.mark.once, pytest.mark.usefixtures("no_pauses", "jobs_here")]

ROOT = Path(__file__).parent.parent


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


def test_speed_of_mixes_and_of_activations(checkpoint, tmp_path, monkeypatch, capsys):
    add_tokenizer(shutil.copytree(checkpoint("hybrid"), tmp_path / "lfm2-350m"))
    monkeypatch.setattr(quantization, "MIXES", {name: quantization.MIXES[name] for name in ("q4", "q4, w2 in 8 bits")})
    quantization.mixes(tmp_path, rounds=1, threads=1)
    plain, wide = cells(capsys.readouterr().out.splitlines()[2:])
    assert (plain[2], plain[4]) == ("1.00 [1.00 to 1.00]", "1.00 [1.00 to 1.00]")
    assert float(plain[1]) > 0
    stored = [(tmp_path / f"quantized-{name}" / "model.onnx_data").stat().st_size for name in ("q4", "q4w2in8bits")]
    assert stored[0] < stored[1]
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    quantization.activations(tmp_path, rounds=1, threads=1)
    rows = cells(capsys.readouterr().out.splitlines()[2:])
    assert [row[0] for row in rows] == [*(f"q8, accuracy_level {level}" for level in (4, 1, 0)), "fp32"]
    levels = {
        node.attributes.get_int("accuracy_level")
        for node in ir.load(tmp_path / "quantized-q8-1" / "model.onnx").graph
        if node.op_type == "MatMulNBits"
    }
    assert levels == {1}
    assert wide[0] == "q4, w2 in 8 bits"


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
