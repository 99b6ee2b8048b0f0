"""`optimum-cli lfm2 evaluate`: its figures, exit codes and refusals."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import pytest
import torch

from optimum.commands.lfm2.evaluate import EvaluateCommand
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.quality.evaluate import compare, evaluate, find_tokenizer, read_chunks, summarise
from optimum_lfm2.quality.quantize_cache import quantize_cache


DEMO = Path(__file__).parents[2] / "demo"
SHORT = ["--chunks", "3", "--length", "128"]


def run(*arguments: str) -> None:
    parser = ArgumentParser()
    EvaluateCommand.parse_args(parser)
    command = object.__new__(EvaluateCommand)
    command.args = parser.parse_args(arguments)
    command.run()


def arguments(model: Path, *more: str) -> list[str]:
    texts = ["--reference", str(DEMO / "checkpoint"), "--text", str(DEMO / "heldout.txt")]
    return [str(model), *texts, *SHORT, *more]


def test_against_sums_by_hand():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    gold = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    sums = compare(logits, gold, torch.tensor([0, 1, 2, 0]))
    own, theirs = logits.double().softmax(-1), gold.double().softmax(-1)
    assert sums.tokens == 2
    assert sums.agreements == 1
    assert sums.loss == pytest.approx(-math.log(own[0, 2]) - math.log(own[1, 0]))
    assert sums.reference_loss == pytest.approx(-math.log(theirs[0, 2]) - math.log(theirs[1, 0]))
    expected = sum(float((theirs[i] * (theirs[i] / own[i]).log()).sum()) for i in range(2))
    assert sums.divergence == pytest.approx(expected)
    twice = summarise([sums, sums])
    assert twice.kl_divergence == pytest.approx(expected / 2)
    assert twice.kl_divergence_error == 0
    assert twice.top1_agreement == 0.5
    assert summarise([replace(sums, loss=1e6)] * 2).perplexity == math.inf


def test_the_tokenizer_of_a_relative_path(hub_folder, monkeypatch):
    monkeypatch.chdir(hub_folder / "onnx")
    assert find_tokenizer(Path("model_q4.onnx")).bos_token == "<|startoftext|>"


def test_an_export_is_its_checkpoint(exported, capsys):
    run(*arguments(exported("trained"), "--json", "--max-kld", "1e-6"))
    result = json.loads(capsys.readouterr().out)
    assert result["top1_agreement"] > 0.999
    assert result["perplexity"] == pytest.approx(result["reference_perplexity"], rel=1e-4)
    assert 1 < result["perplexity"] < 2
    assert (result["chunks"], result["tokens"]) == (3, 3 * 64)


def test_two_chunks_are_enough(tmp_path):
    """The last piece of a text, which is shorter, is left out."""

    def tokenizer(text, **_):
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])

    tokenizer.bos_token_id = 1
    (tmp_path / "text").write_text("11 12 13 14 15")
    pieces = read_chunks(tmp_path / "text", tokenizer, 5, 3)
    assert [piece.tolist() for piece in pieces] == [[[1, 11, 12]], [[1, 13, 14]]]
    with pytest.raises(Lfm2Error, match="has 5 tokens, too few for two chunks of 5"):
        read_chunks(tmp_path / "text", tokenizer, 5, 5)


def test_the_table(exported, capsys):
    run(*arguments(exported("trained")))
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert "192 in 3 chunks" in out


def test_a_broken_file_fails(exported, tmp_path, capsys):
    folder = tmp_path / "broken"
    shutil.copytree(exported("trained"), folder)
    model = ir.load(folder / "model.onnx")
    tensor = model.graph.initializers["model.layers.0.conv.in_proj.weight"].const_value
    with (folder / "model.onnx_data").open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\0" * tensor.length)
    with pytest.raises(SystemExit) as end:
        run(*arguments(folder, "--max-kld", "0.01"))
    assert end.value.code == 1
    assert "above --max-kld 0.01" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "nowhere does not exist"),
        ({"text": "nowhere.txt"}, "nowhere.txt cannot be read"),
        ({"length": 100_000}, "two chunks of 100000"),
        ({"chunks": 1}, "Ask for two or more of each"),
    ],
)
def test_bad_input(change, message, exported):
    options = {"model": exported("trained"), "reference": DEMO / "checkpoint", "text": DEMO / "heldout.txt"}
    with pytest.raises(Lfm2Error, match=message):
        evaluate(**{**options, **change})


def test_other_bad_models(exported, tmp_path):
    text, reference = DEMO / "heldout.txt", DEMO / "checkpoint"
    with pytest.raises(Lfm2Error, match="neither an ONNX file nor a checkpoint"):
        evaluate(tmp_path, reference, text)
    (tmp_path / "a.onnx").write_bytes(b"no graph")
    with pytest.raises(Lfm2Error, match="cannot be loaded"):
        evaluate(tmp_path, reference, text)
    (tmp_path / "b.onnx").write_bytes(b"no graph")
    with pytest.raises(Lfm2Error, match="several models"):
        evaluate(tmp_path, reference, text)
    with pytest.raises(Lfm2Error, match="no output named logits"):
        evaluate(exported("trained", task="feature-extraction"), reference, text)


@pytest.mark.parametrize("text", ["[]", "{", '{"model": 7}'])
def test_a_broken_tokenizer(text, exported, tmp_path, capsys):
    """`tokenizers` raises plain exceptions."""
    folder = shutil.copytree(exported("trained"), tmp_path / "model")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(SystemExit):
        run(*arguments(folder, "--reference", str(folder)))
    assert re.fullmatch(r"optimum-cli: error: The tokenizer in .* cannot be loaded .*\n", capsys.readouterr().err)


def test_a_graph_with_a_symbol_for_the_width_of_heads(exported, tmp_path):
    """onnxruntime-genai's builder writes such a graph, without a config.json."""
    folder = shutil.copytree(exported("trained"), tmp_path / "model")
    model = ir.load(folder / "model.onnx")
    for value in (*model.graph.inputs, *model.graph.outputs):
        if "key" in value.name or "value" in value.name:
            value.shape = ir.Shape([*value.shape[:3], "kv_cache_dim"])
    ir.save(model, folder / "model.onnx")
    (folder / "config.json").unlink()
    quality = evaluate(folder, exported("trained"), DEMO / "heldout.txt", chunks=3, length=128)
    assert quality.kl_divergence == 0
    (folder / "genai_config.json").unlink()
    with pytest.raises(Lfm2Error, match="does not say how wide its heads are"):
        evaluate(folder, exported("trained"), DEMO / "heldout.txt", chunks=3, length=128)


def test_a_graph_of_one_logit(exported, tmp_path):
    folder = shutil.copytree(exported("trained"), tmp_path / "model")
    model = ir.load(folder / "model.onnx")
    model.graph.initializers["num_logits_to_keep"].const_value = ir.tensor(1, name="num_logits_to_keep")
    ir.save(model, folder / "model.onnx")
    for run_ in (
        lambda: evaluate(folder, exported("trained"), DEMO / "heldout.txt", chunks=4, length=128),
        lambda: quantize_cache(folder, DEMO / "heldout.txt", chunks=4, length=128),
    ):
        with pytest.raises(Lfm2Error, match=r"gives 1 logits, but 65 are needed\. Export it without pruning"):
            run_()


def test_through_optimum_cli(exported, cli):
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "lfm2", "evaluate"]
    done = subprocess.run([*command, *arguments(exported("trained"))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "same top token" in done.stdout
    assert "transformers" not in done.stderr  # nor any warning of transformers
    code, err = cli("lfm2", "evaluate", *arguments(Path("nowhere")))
    assert code == 1
    assert err.splitlines()[-1].startswith("optimum-cli: error: nowhere does not exist")
