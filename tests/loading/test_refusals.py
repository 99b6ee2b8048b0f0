"""What `optimum-cli export` refuses before any work, in one line: options, configurations, bad checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import assert_unharmed, pickled
from safetensors.torch import load_file, save_file

from optimum_lfm2.export.options import check_atol


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}

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
        ('--model-kwargs {"embedding":"portable"}', "not quantised"),
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
        ("--atol inf", "--atol"),
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
        ({"quantization_config": "fp8"}, "says fp8"),
        ({"architectures": ["Lfm2BidirForSequenceRouting"]}, "Lfm2BidirForSequenceRouting"),
        ({"architectures": ["Lfm2BidirP2ForRuleMatching"]}, "Lfm2BidirP2ForRuleMatching"),
        ({"architectures": ["Lfm2ForCausalLM", "Lfm2BidirForMaskedLM"]}, "is a Lfm2ForCausalLM"),
        ({"auto_map": {"AutoModel": "modeling.Lfm2BidirectionalModel"}}, "modeling.Lfm2BidirectionalModel"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_lfm2.Lfm2ForCausalLM"}}, "remove auto_map"),
        ({"num_hidden_layers": 6}, "num_hidden_layers is 6"),
        ({"num_hidden_layers": 10**9, "layer_types": None}, "from 1 to 1024"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 4.0}}, "low_freq_factor 4.0"),
        ({"pad_token_id": 256}, "vocab_size 256"),
        ({"head_dim": 15}, "heads are 15 wide"),
        ({"hidden_size": 2, "num_attention_heads": 4}, "heads are 0 wide"),
        ({"hidden_size": "9" * 99}, f'hidden_size in config.json is "{"9" * 56}...; it has to be'),
        ({"id2label": 7}, "transformers cannot use the config.json"),
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


def test_tolerances_that_are_right():
    for atol in (None, 0, 1e-4):
        check_atol(atol)


# Bad checkpoints


def _no_weights(source: Path) -> str:
    (source / "model.safetensors").unlink()
    return "has no weights: no model.safetensors"


def _missing(source: Path) -> str:
    name = "model.layers.2.self_attn.q_proj.weight"
    _change(source, lambda tensors: tensors.pop(name))
    return name


def _misshaped(source: Path) -> str:
    name = "model.layers.0.conv.conv.weight"
    _change(source, lambda tensors: tensors.update({name: tensors[name][:, :, :2].contiguous()}))
    return name


def _pointer(source: Path) -> str:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2858912\n"
    (source / "model.safetensors").write_text(pointer)
    return "git lfs pull"


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
    _pointer,
    _empty,
    _missing_shard,
    _not_a_number,
    pickled,
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
    config = json.loads((source / "config.json").read_text()) | {"model_type": "lfm3_omni"}
    (source / "config.json").write_text(json.dumps(config))
    return "lfm3_omni"


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


@pytest.mark.parametrize("model", ["nowhere/to/be/found", "NO_SUCH_FOLDER", "/no/such/folder", "./no", "docs/no"])
@pytest.mark.parametrize("command", ["lfm2", "onnx"])
def test_no_such_folder(command, model, cli, out, optimums, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    code, err = cli("export", command, "--model", model, out)
    assert (code, err.count("\n")) == (1, 1), err
    assert f"{model} is n" in err
    assert optimums == []
    assert_unharmed(out)


@pytest.mark.parametrize("model", ["no/such", __file__])
def test_what_may_be_anybodys_model_goes_to_optimum(model, cli, out, optimums):
    """The id of a model that is not in the cache, where the Hub is not reached; and a file."""
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
