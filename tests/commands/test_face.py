"""What a user reads: help, the lines at the end of a command, `python -m optimum_lfm2`, one line for a wrong path."""

from __future__ import annotations

import importlib.metadata
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
from optimum.commands.export.onnx import ONNXExportCommand, parse_args_onnx

import optimum_lfm2
from optimum.commands.lfm2 import export_lfm2, export_onnx, gguf_options, help_texts
from optimum_lfm2 import __main__, report
from optimum_lfm2.command import _summary
from optimum_lfm2.compat import TRANSFORMERS_5
from optimum_lfm2.configs import Lfm2OnnxConfig
from optimum_lfm2.export.model_kwargs import VALUES, ExportOptions
from optimum_lfm2.families import member_of
from optimum_lfm2.publish.kinds import ENCODES
from optimum_lfm2.publish.precisions import DEFAULT, PRECISIONS


DEMO = Path(__file__).parents[2] / "demo"
ENCODER = {"model_type": "lfm2", "architectures": ["Lfm2BidirectionalForMaskedLM"]}
DECODER = {"model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"]}


def parsed(*words: str) -> Namespace:
    parser = ArgumentParser()
    export_lfm2.ExportLfm2Command.parse_args(parser)
    return parser.parse_args(["--model", "model", *words])


@pytest.mark.parametrize(
    "words",
    [
        ["out", "--precisions", "q4", "q8"],
        ["--precisions", "q4", "q8", "out"],
        ["--precisions", "q4", "q8", "--", "out"],
    ],
)
def test_options_may_stand_before_the_output(words):
    args = parsed(*words)
    export_lfm2.settle_output(args)
    assert (args.output, args.precisions) == (Path("out"), ["q4", "q8"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "OUT is missing"),
        (["--precisions", "q4", "q8"], "OUT is missing"),
        (["--precisions", "out"], "names none before out"),
    ],
)
def test_without_an_output(words, says):
    with pytest.raises(ValueError, match=says):
        export_lfm2.settle_output(parsed(*words))


def test_usage_and_defaults_of_export_lfm2():
    parser = ArgumentParser()
    export_lfm2.ExportLfm2Command.parse_args(parser)
    assert " ".join(parser.format_usage().split()).endswith("] OUT")
    assert tuple(PRECISIONS) == export_lfm2.PRECISIONS
    text = " ".join(parser.format_help().split())
    encoders = " ".join(name for name in DEFAULT if name not in ENCODES.measured)
    assert f"(default: {' '.join(DEFAULT)}, of an encoder {encoders})" in text


def test_the_help_of_the_tools_lists_what_export_onnx_takes():
    assert help_texts.VARIANTS.keys() == Lfm2OnnxConfig.VARIANTS.keys()
    assert {name: sorted(values) for name, (values, _) in help_texts.MODEL_KWARGS.items()} == {
        name: sorted(values) for name, values in VALUES.items()
    }
    for name, (values, _) in help_texts.MODEL_KWARGS.items():
        assert values[0] == getattr(ExportOptions(), name)
        assert f'"{name}": "{values[0]}" or "{values[1]}"' in help_texts.TOOLS_DESCRIPTION


def test_the_help_of_export_onnx_says_where_in_one_paragraph_and_is_else_as_it_was():
    theirs, ours = ArgumentParser("x"), ArgumentParser("x")
    parse_args_onnx(theirs)
    gguf_options.add_gguf_options(theirs)  # which are ours alone
    export_onnx.register()
    ONNXExportCommand.parse_args(ours)
    ours.epilog, said = None, ours.epilog
    assert ours.format_help() == theirs.format_help()
    assert said == help_texts.ONNX_EPILOG
    assert "optimum-cli lfm2 --help" in said


@pytest.mark.parametrize("variant", ["default", "q4"])
def test_export_onnx_says_what_it_wrote(variant, checkpoint, tmp_path, monkeypatch, capfd):
    from optimum.commands.optimum_cli import main

    out, source = tmp_path / "out", checkpoint("hybrid")
    monkeypatch.setattr(
        sys, "argv", ["optimum-cli", "export", "onnx", "--model", str(source), str(out), "--variant", variant]
    )
    main()
    first, *lines = capfd.readouterr().out.splitlines()
    path, size, unit, *_, difference = first.split()
    assert (path, unit) == (str(out / "model.onnx"), "MB")
    assert size == f"{sum(file.stat().st_size for file in out.glob('model.onnx*')) / 1e6:.2f}"
    assert "checked against transformers" in first
    assert 0 < float(difference) < 1e-3
    assert lines[2] == f'  model = ORTLfm2ForCausalLM.from_pretrained("{out}")'
    assert ("rounding" in lines[3]) == (variant == "q4")
    assert lines[4] == f"  optimum-cli lfm2 evaluate {out} --reference {source} --text FILE"


@pytest.mark.parametrize(
    ("config", "task", "loads"),
    [
        (ENCODER, "auto", "ORTModelForMaskedLM"),
        (ENCODER, "feature-extraction", "ORTModelForFeatureExtraction"),
        (DECODER, "causal-lm-with-past", "ORTLfm2ForCausalLM"),
        (DECODER, "feature-extraction-with-past", None),  # no class of Optimum feeds its caches
        ({"model_type": "lfm2_vl"}, "auto", "ORTLfm2VlForConditionalGeneration"),
    ],
)
def test_the_class_that_loads_an_export(config, task, loads, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"0" * 10**6)
    args = Namespace(model="me/lfm2", output=tmp_path, task=task, variant="default")
    said = _summary(args, member_of(config), config.get("architectures"), {Path("model.onnx"): 1e-6})
    assert said.startswith(f"{tmp_path / 'model.onnx'}  1.00 MB")
    assert ("from_pretrained" in said) == (loads is not None)
    assert loads is None or f" {loads}.from_pretrained(" in said
    assert ("evaluate" in said) == (task != "feature-extraction-with-past")
    assert ("import optimum_lfm2\n" in said) == (TRANSFORMERS_5 and "ORTModel" in (loads or ""))


def test_a_file_is_loaded_from_the_folder_that_has_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub" / "onnx").mkdir(parents=True)
    (tmp_path / "hub" / "config.json").write_text("{}")
    for path, options in [
        ("hub/onnx/a.onnx", '"hub", subfolder="onnx", file_name="a.onnx"'),
        ("hub/a.onnx", '"hub", file_name="a.onnx"'),
        ("elsewhere/a.onnx", '"elsewhere", file_name="a.onnx"'),
        ("für mich/a.onnx", '"für mich", file_name="a.onnx"'),
    ]:
        assert report.loading_file("text-generation", Path(path)).endswith(f"from_pretrained({options})")


def test_sizes_have_one_unit():
    assert [report.megabytes(size) for size in (812_345, 35_249_000, 222_400_000, 16_100_000_000)] == [
        "0.81",
        "35.2",
        "222",
        "16100",
    ]


def test_python_dash_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["optimum_lfm2"])
    __main__.main()
    out = capsys.readouterr().out
    assert out.startswith(f"optimum-lfm2 {optimum_lfm2.__version__}, Python 3.")
    assert f"transformers        {importlib.metadata.version('transformers')}\n" in out
    for words in ("export onnx", "export lfm2", "lfm2 evaluate", "lfm2 quantize-cache"):
        assert f"  optimum-cli {words} " in out


def test_the_version_is_that_of_the_package():
    try:
        installed = importlib.metadata.version("optimum-lfm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("optimum-lfm2 is only on the path")
    assert optimum_lfm2.__version__ == installed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lfm2", "evaluate", "nowhere", "--reference", "checkpoint", "--text", "text"], "nowhere does not exist"),
        (["lfm2", "evaluate", "checkpoint", "--reference", "nowhere", "--text", "text"], "nowhere does not exist"),
        (
            ["lfm2", "evaluate", "checkpoint", "--reference", "checkpoint", "--text", "nowhere"],
            "nowhere cannot be read",
        ),
        (["lfm2", "quantize-cache", "nowhere", "--text", "text"], "nowhere does not exist"),
        (["lfm2", "quantize-cache", "checkpoint", "--text", "text"], "holds no ONNX file"),
        (["export", "lfm2", "--model", "./nowhere", "out"], "./nowhere is neither a folder nor an id of the Hub"),
        (["export", "lfm2", "--model", "nowhere/at", "out"], "nowhere/at is no folder"),
        (["export", "lfm2", "--model", "text", "out"], "text is a file"),
        (["export", "onnx", "--model", "checkpoint/config.json", "out"], "checkpoint/config.json is a file. Give the"),
        (["export", "lfm2", "--model", "checkpoint", "out", "--text", "nowhere"], "nowhere cannot be read"),
        (["export", "lfm2", "--model", "checkpoint", "--precisions", "q4"], "OUT is missing"),
    ],
)
def test_a_wrong_path_is_one_line(words, says, cli, tmp_path, monkeypatch):
    (tmp_path / "checkpoint").symlink_to(DEMO / "checkpoint")
    (tmp_path / "text").symlink_to(DEMO / "heldout.txt")
    monkeypatch.chdir(tmp_path)
    code, err = cli(*words)
    assert (code, err.count("\n")) == (1, 1), err
    assert says in err
