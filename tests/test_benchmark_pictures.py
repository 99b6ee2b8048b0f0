"""Benchmarks of encoders and of towers."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from tables import cells

from benchmarks import (
    encoders,
    lfm3_vision,
    vision,
)
from optimum_lfm2 import compat


pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.mark.once
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


@pytest.mark.once
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


@pytest.mark.once
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
    sides = ["--side", "64", "32"]
    lfm3_vision.main(["--work", str(tmp_path), *sides, "--rounds", "2", "--threads", "1"], **tower)
    written = capsys.readouterr().out
    assert re.findall(r"(\d+) pixels", written) == sides[1:]
    rows = cells(re.findall(r"^\| [to].*", written, flags=re.MULTILINE))
    assert [row[0] for row in rows] == ["transformers", "ours-fp32"] * 2
    assert min(float(row[1]) for row in rows) > 0
