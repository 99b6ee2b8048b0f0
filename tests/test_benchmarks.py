"""The benchmarks on a tiny checkpoint: every job runs, our systems agree with transformers, the pages are written."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    cuda,
    report,
    run,
    turns,
    worker,
)
from benchmarks.bench import Bench
from benchmarks.systems import SYSTEMS


pytestmark = [pytest.mark.once, pytest.mark.usefixtures("no_pauses", "jobs_here")]

ROOT = Path(__file__).parent.parent
OPTIONS = ["--rounds", "1", "--loads", "1", "--threads", "1", "--chats", "16:4", "40:3", "--quality", "2"]
PAGES = ("README.md", "docs/performance.md")
NAMES = ["ours-fp32", "ours-q4", "transformers-fp32"]


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
        assert all(len(rounds) == 1 and min(map(min, rounds)) > 0 for rounds in system["speeds"].values())
    assert measured["long_prompt"]["tokens"] == 48
    assert list(measured["long_prompt"]["systems"]) == ["ours-q4"]
    assert "A prompt of 48 tokens adds" in results.with_name("table.md").read_text()


def test_quality_is_measured_beside_speed(results):
    """Of the demo checkpoint: float is transformers', 4 bits are near it and not the same."""
    systems = json.loads(results.read_text())["systems"]
    assert systems["transformers-fp32"]["divergence"] == 0
    assert 0 <= systems["ours-fp32"]["divergence"] < 1e-6
    assert 1e-4 < systems["ours-q4"]["divergence"] < 0.02


def test_float_systems_agree(results, checkpoint, exported):
    systems = json.loads(results.read_text())["systems"]
    gold = systems["transformers-fp32"]["loads"][0]["tokens"]
    assert systems["ours-fp32"]["loads"][0]["tokens"] == gold
    assert "ours-fp32 5." in results.with_name("table.md").read_text()
    loop = SYSTEMS["loop-fp32"].load(exported("hybrid"), 1, 64)
    assert loop.run(worker.prompt_ids(16, 256), 4).tokens == gold


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
    run.main([*places, "--systems", "llama-q4_0", "--python", f"xllamacpp={empty}", "--long-prompt", "0"])
    assert "llama-q4_0 left out: xllamacpp is not installed" in capsys.readouterr().err


def test_without_a_gpu_cuda_says_so(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["benchmarks.cuda"])
    with pytest.raises(SystemExit, match=r"^No CUDA here.*\.$"):
        cuda.main()


def test_every_system_has_its_module():
    for name, entry in SYSTEMS.items():
        assert (ROOT / "benchmarks" / "systems" / f"{entry.module}.py").is_file(), name
