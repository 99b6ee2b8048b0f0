"""`optimum-cli export onnx` for a user: options, refusals, bad checkpoints, and the files that are left on the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import make_checkpoint, prompts
from optimum.commands.optimum_cli import main
from optimum.exporters.onnx import convert, main_export
from optimum.onnxruntime import ORTModelForCausalLM
from safetensors.torch import load_file, save_file

from optimum_lfm2.compat import TRANSFORMERS_5
from optimum_lfm2.errors import Lfm2Error


ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
CLI = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()"]


@pytest.fixture
def cli(monkeypatch, capfd):
    """`cli(*arguments)` runs `optimum-cli` in this process and returns the exit code and standard error."""

    def run(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
        return code, capfd.readouterr().err

    return run


@pytest.fixture
def out(tmp_path) -> Path:
    """An output folder with older files. A failure must leave them as they are."""
    folder = tmp_path / "work" / "out"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_text("old")
    (folder / "notes.txt").write_text("mine")
    return folder


def assert_unharmed(out: Path) -> None:
    assert {path.name: path.read_text() for path in out.iterdir()} == {"model.onnx": "old", "notes.txt": "mine"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def run_file(folder: Path) -> np.ndarray:
    """Return the first output of the model in `folder`, for one prompt on empty caches."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    (prompt,) = prompts([9])
    inputs = {"input_ids": prompt[None].numpy(), "attention_mask": np.ones((1, 9), dtype=np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            shape = [{"batch_size": 1, "past_sequence_length": 0}.get(size, size) for size in value.shape]
            inputs[value.name] = np.zeros(shape, np.float16 if "float16" in value.type else np.float32)
    return session.run(None, inputs)[0]


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


# What is refused before any work


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--dtype bf16", "fp16"),
        ("--optimize O1", "--optimize"),
        ("--optimize O4", "--optimize"),
        ("--slim", "--slim"),
        ("--no-dynamic-axes", "grow its cache"),
        ("--device cuda", "Leave it out"),
        ("--opset 17", "18 to 20"),
        ("--opset 21", "18 to 20"),
        ("--variant nonsense", "default: "),
        ('--model-kwargs {"output_attentions":true}', "output_attentions"),
        ("--model-kwargs [1]", "JSON object"),
        ('--model-kwargs {"embedding":"quantised"}', "embedding (fused, portable, float)"),
        ('--model-kwargs {"embedding":true}', "embedding (fused, portable, float)"),
        ('--model-kwargs {"cache_names":"mine"}', "cache_names (hub, genai)"),
        ('--model-kwargs {"num_logits_to_keep":1}', "num_logits_to_keep (optional, required)"),
        ("--batch_size 0", "--batch_size 0"),
        ("--sequence_length -1", "--sequence_length -1"),
        ("--sequence_length 9999", "512"),
        ("--height 5", "--height"),
        ("--num_choices 2", "--num_choices"),
        ("--library-name timm", "transformers"),
        ("--task fill-mask", "text-generation-with-past"),
        ("--task text-generation-with-past --monolith", "--task text-generation."),
        ("--pad_token_id 0", "attention_mask"),
        ("--atol nan", "--atol"),
        ("--atol -1", "--atol"),
    ],
)
def test_option_is_refused(options, says, cli, checkpoint, out, monkeypatch):
    monkeypatch.setattr("optimum.exporters.onnx.main_export", None)  # no work before the refusal
    code, err = cli("export", "onnx", "--model", checkpoint("hybrid"), out, *options.split())
    assert code == 1
    assert err.startswith("optimum-cli: error: ")
    assert says in err
    assert err.count("\n") == 1 or "--variant" in options
    assert_unharmed(out)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer_types": ["conv", "mamba", "conv", "conv", "conv"]}, "mamba"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "longrope"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": None}, "quantization_config"),
        ({"architectures": ["Lfm2BidirectionalModel"]}, "Lfm2BidirectionalModel"),
        ({"architectures": ["Lfm2ForCausalLM", "Lfm2BidirForMaskedLM"]}, "Lfm2BidirForMaskedLM"),
        ({"auto_map": {"AutoModel": "modeling.Lfm2BidirectionalModel"}}, "modeling.Lfm2BidirectionalModel"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_lfm2.Lfm2ForCausalLM"}}, "remove auto_map"),
        ({"num_hidden_layers": 6}, "num_hidden_layers is 6"),
        ({"num_hidden_layers": 10**9, "layer_types": None}, "from 1 to 1024"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
    ],
)
def test_configuration_is_refused(change, says, cli, checkpoint, out, tmp_path):
    source = shutil.copytree(checkpoint("hybrid"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    code, err = cli("export", "onnx", "--model", source, out)
    assert (code, err.count("\n")) == (1, 1)
    assert says in err
    assert_unharmed(out)


# Bad checkpoints


def _no_weights(source: Path) -> str:
    (source / "model.safetensors").unlink()
    return "safetensors"


def _missing(source: Path) -> str:
    name = "model.layers.2.self_attn.q_proj.weight"
    _change(source, lambda tensors: tensors.pop(name))
    return name


def _misshaped(source: Path) -> str:
    name = "model.layers.0.conv.conv.weight"
    _change(source, lambda tensors: tensors.update({name: tensors[name][:, :, :2].contiguous()}))
    return name


def _truncated(source: Path) -> str:
    path = source / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    return "model.safetensors"


def _empty(source: Path) -> str:
    (source / "model.safetensors").write_bytes(b"")
    return "model.safetensors"


def _missing_shard(source: Path) -> str:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    index["weight_map"]["model.embedding_norm.weight"] = "model-00002-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model-00002-of-00002.safetensors"


def _pickle(source: Path) -> str:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    del tensors["model.layers.1.feed_forward.w1.weight"]
    torch.save(tensors, source / "pytorch_model.bin")
    return "save_pretrained("


def _shard_elsewhere(source: Path) -> str:
    (source / "model.safetensors").rename(source.parent / "model.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return "no safetensors file beside it"


def _unnamed_with_a_strange_tensor(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": None}))
    _change(source, lambda tensors: tensors.update({"dense.weight": torch.ones(2, 2)}))
    return "dense.weight"


def _broken_generation_settings(source: Path) -> str:
    (source / "generation_config.json").write_text('{"temperature": 0.3,')
    return "generation_config.json"


def _not_a_number(source: Path) -> str:
    name = "model.layers.1.feed_forward.w1.weight"
    _change(source, lambda tensors: tensors[name].fill_(float("nan")))
    return name


def _change(source: Path, change) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


DEFECTS = [
    _no_weights,
    _missing,
    _misshaped,
    _truncated,
    _empty,
    _missing_shard,
    _not_a_number,
    _pickle,
    _shard_elsewhere,
    _unnamed_with_a_strange_tensor,
    _broken_generation_settings,
]


@pytest.mark.parametrize("spoil", DEFECTS, ids=lambda spoil: spoil.__name__)
def test_bad_checkpoint_is_one_line(spoil, cli, checkpoint, out, tmp_path):
    source = shutil.copytree(checkpoint("hybrid"), tmp_path / "source")
    says = spoil(source)
    code, err = cli("export", "onnx", "--model", source, out)
    assert (code, err.count("\n")) == (1, 1), err
    assert says in err
    assert_unharmed(out)


# What is no model of ours: `export lfm2` says so in one line, `export onnx` leaves it to Optimum.


def _no_config(source: Path) -> str:
    (source / "config.json").unlink()
    return "no config.json"


def _broken_config(source: Path) -> str:
    (source / "config.json").write_text('{"model_type": "lfm2",')
    return "JSON"


def _no_object(source: Path) -> str:
    (source / "config.json").write_text("[]")
    return "no model's configuration"


def _another_type(source: Path) -> str:
    config = json.loads((source / "config.json").read_text()) | {"model_type": "lfm2_vl"}
    (source / "config.json").write_text(json.dumps(config))
    return "lfm2_vl"


@pytest.fixture
def optimums(monkeypatch) -> list[str]:
    """Replace Optimum's `main_export`, and return the list of the models that it is called for."""
    asked: list[str] = []
    monkeypatch.setattr(
        "optimum.exporters.onnx.main_export", lambda model_name_or_path, **_: asked.append(model_name_or_path)
    )
    return asked


@pytest.mark.parametrize("spoil", [_no_config, _broken_config, _no_object, _another_type], ids=lambda f: f.__name__)
def test_what_is_not_ours_goes_to_optimum(spoil, cli, checkpoint, out, tmp_path, optimums):
    source = shutil.copytree(checkpoint("hybrid"), tmp_path / "source")
    says = spoil(source)
    code, err = cli("export", "lfm2", "--model", source, out)
    assert (code, err.count("\n")) == (1, 1), err
    assert says in err
    assert cli("export", "onnx", "--model", source, out) == (0, "")
    assert optimums == [str(source)]
    assert_unharmed(out)


@pytest.mark.parametrize("model", ["nowhere/to/be/found", "no/such", "/no/such/folder", __file__])
def test_no_such_model(model, cli, out, optimums):
    code, err = cli("export", "lfm2", "--model", model, out)
    assert (code, err.count("\n")) == (1, 1), err
    assert model in err
    assert cli("export", "onnx", "--model", model, out) == (0, "")
    assert optimums == [model]
    assert_unharmed(out)


def test_a_cached_repository_without_config_is_not_said_to_be_unreachable(cli, tmp_path, optimums):
    snapshot = tmp_path / "cache" / "models--some--diffuser" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    where = ("--model", "some/diffuser", tmp_path / "out", "--cache_dir", tmp_path / "cache")
    assert cli("export", "onnx", *where) == (0, "")
    assert optimums == ["some/diffuser"]
    code, err = cli("export", "lfm2", *where)
    assert (code, err.count("\n")) == (1, 1), err
    assert "no config.json of it is in the cache" in err


# From Python


def test_python_heeds_a_variant(checkpoint, tmp_path):
    main_export(str(checkpoint("hybrid")), tmp_path, variant="q4")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert any(node.op_type == "MatMulNBits" for node in graph.node)


def test_python_refuses_as_the_command_does(checkpoint, tmp_path):
    with pytest.raises(Lfm2Error, match="no variant nonsense"):
        main_export(str(checkpoint("hybrid")), tmp_path, variant="nonsense")
    with pytest.raises(Lfm2Error, match="bf16"):
        main_export(str(checkpoint("hybrid")), tmp_path, dtype="bf16")
    source = shutil.copytree(checkpoint("hybrid"), tmp_path / "source")
    _pickle(source)
    with pytest.raises(Lfm2Error, match="save_pretrained"):
        main_export(str(source), tmp_path)
    with pytest.raises(Lfm2Error, match="save_pretrained"):
        ORTModelForCausalLM.from_pretrained(source, export=True)


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


def test_bf16_checkpoint(cli, tmp_path):
    source = make_checkpoint("hybrid", tmp_path, dtype=torch.bfloat16)
    assert cli("export", "onnx", "--model", source, tmp_path / "out") == (0, "")
    assert run_file(tmp_path / "out").dtype == np.float32


def test_generation_settings_that_transformers_does_not_save_are_carried_over(checkpoint, tmp_path):
    """Release 4 and 5 load them with a warning, and fine-tunes have them."""
    source = shutil.copytree(checkpoint("hybrid"), tmp_path / "source")
    written = '{"do_sample": false, "temperature": 0.3, "eos_token_id": [7, 8]}'
    (source / "generation_config.json").write_text(written)
    main_export(str(source), tmp_path / "out", do_validation=False)
    assert (tmp_path / "out" / "generation_config.json").read_text() == written
    loaded = ORTModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert (loaded.temperature, loaded.eos_token_id) == (0.3, [7, 8])
    assert "written" not in loaded.to_dict()


@pytest.mark.parametrize("arguments", [{}, {"task": "text-generation-with-past"}], ids=["no task", "task"])
def test_python_names_a_wrong_field(arguments, checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("hybrid"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"layer_types": 7}))
    with pytest.raises(Lfm2Error, match="layer_types in"):
        main_export(str(source), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_python_refuses_an_unknown_argument(checkpoint, tmp_path):
    with pytest.raises(Lfm2Error, match="knows no varient"):
        main_export(str(checkpoint("hybrid")), tmp_path / "out", varient="q4")
    assert not (tmp_path / "out").exists()
    main_export(str(checkpoint("hybrid")), tmp_path / "out", sequence_length=5, do_validation=False)


def test_an_export_while_loading_refuses_a_variant(checkpoint):
    with pytest.raises(Lfm2Error, match="variant"):
        ORTModelForCausalLM.from_pretrained(checkpoint("hybrid"), export=True, variant="q4")
