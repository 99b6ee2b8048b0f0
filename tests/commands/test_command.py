"""`optimum-cli export onnx` for a user: options that work, failures on the way, and other models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from checkpoints import make_checkpoint, prompts
from commands import assert_unharmed, run_file
from optimum.exporters.onnx import convert

from optimum_lfm2.compat import TRANSFORMERS_5


ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
CLI = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()"]


@pytest.fixture
def expected(gold_model):
    (prompt,) = prompts([9])
    with torch.no_grad():
        return gold_model("hybrid")(input_ids=prompt[None], use_cache=False).logits.numpy()


# What works


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--task text-generation-with-past",
        "--task text-generation",
        "--monolith",
        "--task causal-lm-with-past",
        "--dtype fp32 --opset 18",
        "--opset 19",
        "--opset 20",
        "--atol 1e-3",
        "--no-post-process",
        "--no-constant-folding",
        "--batch_size 3 --sequence_length 5",
        "--batch_size 1 --sequence_length 1",
        "--sequence_length 512",  # the longest that the checkpoint goes to
        "--variant default --trust-remote-code --library-name transformers",
        "--framework pt --device cpu --cache_dir cache",
    ],
)
def test_option_works_in_silence(options, cli, checkpoint, expected, tmp_path):
    out = tmp_path / "new" / "out"
    code, err = cli("export", "onnx", "--model", checkpoint("hybrid"), out, *options.split())
    assert (code, err) == (0, "")
    np.testing.assert_allclose(run_file(out), expected, atol=1e-4)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    cached = "--task text-generation " not in options + " " and "--monolith" not in options
    assert any(value.name.startswith("past") for value in model.graph.input) == cached
    opset = int(options.split("--opset ")[1]) if "--opset" in options else 18
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.onnx",
        "model.onnx_data",
    ]
    assert list(out.parent.iterdir()) == [out]


def test_fp16_is_finite_and_close(cli, checkpoint, expected, tmp_path):
    code, err = cli("export", "onnx", "--model", checkpoint("hybrid"), tmp_path / "out", "--dtype", "fp16")
    assert (code, err) == (0, "")
    logits = run_file(tmp_path / "out")
    assert logits.dtype == np.float16
    np.testing.assert_allclose(logits.astype(np.float32), expected, atol=0.02)


@pytest.mark.parametrize("task", ["feature-extraction", "feature-extraction-with-past"])
def test_features(task, cli, checkpoint, gold_model, tmp_path):
    code, err = cli("export", "onnx", "--model", checkpoint("hybrid"), tmp_path / "out", "--task", task)
    assert (code, err) == (0, "")
    with torch.no_grad():
        expected = gold_model("hybrid").model(input_ids=prompts([9])[0][None], use_cache=False).last_hidden_state
    np.testing.assert_allclose(run_file(tmp_path / "out"), expected.numpy(), atol=1e-4)


def test_a_decoder_saved_without_head_is_exported_for_features(cli, gold_model, tmp_path):
    gold_model("hybrid").model.save_pretrained(tmp_path / "decoder")
    (tmp_path / "decoder" / "config_sentence_transformers.json").write_text("{}")  # as LFM2-ColBERT has
    (tmp_path / "decoder" / "modules.json").write_text("[]")
    assert cli("export", "onnx", "--model", tmp_path / "decoder", tmp_path / "out") == (0, "")
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert model.graph.output[0].name == "last_hidden_state"


def test_replaces_its_own_files_and_leaves_others(cli, checkpoint, expected, out):
    assert cli("export", "onnx", "--model", checkpoint("hybrid"), out) == (0, "")
    np.testing.assert_allclose(run_file(out), expected, atol=1e-4)
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_bf16_checkpoint(cli, tmp_path):
    source = make_checkpoint("hybrid", tmp_path, dtype=torch.bfloat16)
    assert cli("export", "onnx", "--model", source, tmp_path / "out") == (0, "")
    assert run_file(tmp_path / "out").dtype == np.float32


# A failure on the way


def test_a_wrong_file_is_not_kept(cli, checkpoint, out):
    code, err = cli("export", "onnx", "--model", checkpoint("hybrid"), out, "--atol", "0")
    assert (code, err.count("\n")) == (1, 1)
    assert "--atol" in err
    assert_unharmed(out)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (OSError(28, "No space left on device"), 1),
        (PermissionError(13, "Permission denied"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=["full", "permission", "interrupt"],
)
@pytest.mark.parametrize("hook", ["export_models", "validate_models_outputs"])
def test_failure_on_the_way(hook, failure, code, cli, checkpoint, out, monkeypatch):
    real = getattr(convert, hook)

    def fail(*args, **kwargs):
        real(*args, **kwargs)
        raise failure

    monkeypatch.setattr(convert, hook, fail)
    assert cli("export", "onnx", "--model", checkpoint("hybrid"), out)[0] == code
    assert_unharmed(out)


def test_output_is_a_file(cli, checkpoint, tmp_path):
    (tmp_path / "out").write_text("mine")
    code, err = cli("export", "onnx", "--model", checkpoint("hybrid"), tmp_path / "out")
    assert (code, err.count("\n")) == (1, 1)
    assert (tmp_path / "out").read_text() == "mine"


def test_read_only_place(cli, checkpoint, tmp_path):
    code, err = cli("export", "onnx", "--model", checkpoint("hybrid"), "/proc/out")
    assert (code, err.count("\n")) == (1, 1)
    assert "/proc" in err


@pytest.mark.once
def test_a_write_that_really_fails(checkpoint, out):
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from optimum.commands.optimum_cli import main; main()"
    )
    command = [sys.executable, "-c", code, "export", "onnx", "--model", str(checkpoint("hybrid")), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "File too large" in done.stderr
    assert_unharmed(out)


@pytest.mark.once
def test_terminated(checkpoint, out):
    command = [*CLI, "export", "onnx", "--model", str(checkpoint("hybrid")), str(out)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while len(list(out.parent.iterdir())) == 1 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert_unharmed(out)


# Other models


@pytest.mark.skipif(TRANSFORMERS_5, reason="optimum-onnx 0.1.0 exports no Llama with transformers 5")
def test_other_models_go_to_optimum_untouched(cli, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    code, _ = cli("export", "onnx", "--model", tmp_path / "llama", tmp_path / "out", "--task", "text-generation")
    assert code == 0
    assert (tmp_path / "out" / "model.onnx").is_file()


@pytest.mark.skipif(TRANSFORMERS_5, reason="optimum-onnx 0.1.0 is not imported before us there: it would fail")
def test_ours_wins_over_a_config_of_optimum(checkpoint, tmp_path):
    """A later optimum-onnx may have a configuration of its own for these types."""
    code = """
from optimum.exporters.tasks import TasksManager
import optimum.exporters.onnx.model_configs as theirs
TasksManager.create_register("onnx", overwrite_existing=True)("lfm2", "text-generation", "text-generation-with-past")(
    theirs.LlamaOnnxConfig
)
from optimum.commands.optimum_cli import main
main()
"""
    command = [
        sys.executable,
        "-c",
        code,
        "export",
        "onnx",
        "--model",
        str(checkpoint("hybrid")),
        str(tmp_path / "out"),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=ENVIRONMENT)
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert any(value.name == "past_conv.0" for value in model.graph.input)
