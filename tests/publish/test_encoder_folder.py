"""`export lfm2` of an encoder: the folder, its card, and what `lfm2 evaluate` says of it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoints import make_encoder
from embedding import TEXTS, make_embedding, states_alone
from node import needs_node
from publishing import DEMO, js_config, rows, run

from benchmarks.checkpoint import add_tokenizer
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.quality.evaluate import evaluate


NODE = Path(__file__).parents[1] / "interop" / "encoder.mjs"
TEXT = ["--text", DEMO / "heldout.txt", "--chunks", 4, "--length", 64]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_embedding(tmp_path_factory.mktemp("embedding"))


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    """Never write to it."""
    folder = tmp_path_factory.mktemp("publish") / "encoder"
    assert run("--model", source, folder, *TEXT) == 0
    return folder


def test_files_and_card(folder):
    files = sorted(path.name for path in (folder / "onnx").glob("*.onnx"))
    assert files == ["model.onnx", "model_fp16.onnx", "model_quantized.onnx"]
    assert {"modules.json", "1_Pooling", "2_Normalize", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "genai_config.json").exists()
    assert not (folder / "generation_config.json").exists()
    assert js_config(folder)["use_external_data_format"]
    cosines = {precision: float(cells[7]) for precision, cells in rows(folder).items()}
    assert cosines["fp32"] > 0.99999
    assert cosines["fp16"] > 0.9999
    assert 0.98 < cosines["q8"] < cosines["fp16"]
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card


def test_the_examples_of_the_card_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        if "sentence_transformers" in block:
            pytest.importorskip("sentence_transformers")
        exec(block, {})
    assert "(2, 64)" in capsys.readouterr().out


@needs_node
def test_transformers_js(source, folder):
    command = ["node", str(NODE), str(folder), "fp32"]
    done = subprocess.run(command, input=json.dumps(TEXTS), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    for states, mask, expected in zip(answer["states"], answer["mask"], states_alone(source, TEXTS), strict=True):
        own = torch.tensor(states)[torch.tensor(mask).bool()]
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=0)


@pytest.mark.once
def test_four_bits_are_kept_only_where_vectors_stay_near(source, folder, tmp_path, capfd):
    assert run("--model", source, tmp_path / "out", "--precisions", "q4") == 1
    assert "--text" in capfd.readouterr().err
    assert run("--model", source, tmp_path / "out", "--precisions", "q4", *TEXT) == 1  # random weights lose most
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "0.99 is asked for" in err
    assert not (tmp_path / "out").exists()


def test_caches_have_no_names(source, tmp_path, capfd):
    assert run("--model", source, tmp_path / "out", "--cache-names", "genai") == 1
    assert "an encoder has no caches" in capfd.readouterr().err


@pytest.mark.once
def test_a_masked_language_model_and_its_agreement(tmp_path):
    source = add_tokenizer(make_encoder("masked_lm", tmp_path, vocab_size=2048))
    folder = tmp_path / "out"
    assert run("--model", source, folder, "--precisions", "q8") == 0
    assert "ORTModelForMaskedLM" in (folder / "README.md").read_text()
    quality = evaluate(folder, source, DEMO / "heldout.txt", chunks=4, length=64)
    assert 0.98 < quality.cosine_p1 < quality.cosine < 1
    assert 0.8 < quality.agreement <= 1
    assert json.loads(json.dumps(quality.as_dict()))["vectors"] == 256
    with pytest.raises(Lfm2Error, match="differ in shape"):
        evaluate(folder, make_embedding(tmp_path / "other"), DEMO / "heldout.txt", chunks=4, length=64)
