"""`optimum-cli export lfm2`: one folder that Optimum, onnxruntime-genai and plain onnxruntime run as it is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from checkpoints import gold_tokens, prompts
from huggingface_hub import ModelCard
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from optimum.commands.lfm2.export_lfm2 import ExportLfm2Command
from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.evaluate import evaluate
from optimum_lfm2.export import loading
from optimum_lfm2.export.precisions import PRECISIONS


DEMO = Path(__file__).parents[2] / "demo"
TRAINED = DEMO / "checkpoint"
TEXT = ["--text", DEMO / "heldout.txt", "--chunks", 2, "--length", 128]
FILES = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "genai_config.json",
    "generation_config.json",
    *(f"onnx/{precision.file}{part}" for precision in PRECISIONS.values() for part in ("", "_data")),
    "tokenizer.json",
    "tokenizer_config.json",
]
CHAT = [{"role": "user", "content": "What is 3 plus 4?"}]
STORY = "Once upon a time there was a girl named Nora"


def run(*arguments: object) -> int:
    """`optimum-cli export lfm2` in this process: its exit code."""
    parser = ArgumentParser()
    ExportLfm2Command.parse_args(parser)
    command = object.__new__(ExportLfm2Command)
    command.args = parser.parse_args(list(map(str, arguments)))
    try:
        command.run()
    except SystemExit as end:
        return end.code
    return 0


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def js_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["transformers.js_config"]


def rows(folder: Path) -> dict[str, list[str]]:
    """The card's table, by precision."""
    table = [line.strip("| ").split(" | ") for line in (folder / "README.md").read_text().splitlines() if "|" in line]
    return {cells[0]: cells for cells in table if cells[0] in PRECISIONS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every precision of the trained checkpoint, measured. Never write to it."""
    out = tmp_path_factory.mktemp("publish") / "lfm2"
    loads = []
    call = loading._Materialize.__call__
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading._Materialize, "__call__", lambda self, *args: loads.append(1) or call(self, *args))
        assert run("--model", TRAINED, out, "--base-model", "me/trained", "--license", "apache-2.0", *TEXT) == 0
    assert len(loads) == 6, "the weights are loaded for each precision, and for the text"
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("publish") / "two"
    assert run("--model", TRAINED, out, "--precisions", "q4", "fp32") == 0
    return out


@pytest.fixture
def small(two, tmp_path) -> Path:
    """A folder with fp32 and q4, to write to."""
    return shutil.copytree(two, tmp_path / "work" / "small")


def story() -> torch.Tensor:
    return AutoTokenizer.from_pretrained(TRAINED)(STORY, return_tensors="pt").input_ids


def answer(folder: Path, **options: str) -> str:
    model = ORTModelForCausalLM.from_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# The folder


def test_the_files(folder):
    assert sorted(set(tree(folder)) - {"special_tokens_map.json"}) == sorted(FILES)  # which transformers 4 alone writes
    assert [path.name for path in folder.parent.iterdir()] == ["lfm2"]
    assert "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())


def test_transformers_js_is_told_which_files_have_their_weights_beside_them(folder):
    names = ["model.onnx", "model_fp16.onnx", "model_quantized.onnx", "model_q4.onnx", "model_q4f16.onnx"]
    assert js_config(folder) == {"use_external_data_format": dict.fromkeys(names, True)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_browser_can_run_it(folder, precision):
    """No operator that its builds lack, no default that Transformers.js would leave alone, caches named and shaped."""
    model = ir.load(folder / "onnx" / PRECISIONS[precision].file)
    assert "GatherBlockQuantized" not in {node.op_type for node in model.graph}
    inputs = {value.name: value for value in model.graph.inputs}
    assert "num_logits_to_keep" in inputs
    assert "num_logits_to_keep" not in model.graph.initializers
    assert [str(axis) for axis in inputs["past_conv.0"].shape] == ["batch_size", "128", "3"]
    half = precision.endswith("16")
    assert inputs["past_conv.0"].dtype == (ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "vector"])
def test_num_logits_to_keep_is_a_scalar_or_a_vector(folder, shape):
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    feeds = {"input_ids": story().numpy(), "attention_mask": np.ones_like(story().numpy())}
    for value in session.get_inputs()[2:-1]:
        sizes = [{"batch_size": 1, "past_sequence_length": 0}.get(axis, axis) for axis in value.shape]
        feeds[value.name] = np.zeros(sizes, np.float32)
    (every,) = session.run(["logits"], feeds | {"num_logits_to_keep": np.zeros(shape, np.int64)})
    (last,) = session.run(["logits"], feeds | {"num_logits_to_keep": np.ones(shape, np.int64)})
    assert every.shape[1] == story().shape[1]
    np.testing.assert_allclose(last, every[:, -1:], atol=1e-5)
    with pytest.raises(ValueError, match="num_logits_to_keep"):
        session.run(["logits"], feeds)


# Optimum


def test_greedy_tokens_are_those_of_transformers(folder, gold_model):
    """The folder alone: its fp32 file is what Optimum takes."""
    model = ORTModelForCausalLM.from_pretrained(folder)
    assert Path(model.path).name == "model.onnx"
    out = model.generate(story(), max_new_tokens=60, do_sample=False)
    gold = gold_tokens(gold_model("trained").float(), story()[0], 60)
    assert out[0, story().shape[1] :].tolist() == gold


@pytest.mark.skipif(not compat.TRANSFORMERS_5, reason="exporting models with experts takes transformers 5")
def test_a_model_with_experts(checkpoint, gold_model, tmp_path):
    """Half precision twice: validation of the first must not change what the second is made of."""
    source, out = shutil.copytree(checkpoint("moe"), tmp_path / "checkpoint"), tmp_path / "out"
    for file in TRAINED.glob("*token*"):
        shutil.copy(file, source)
    assert run("--model", source, out, "--precisions", "fp32", "fp16", "q4f16") == 0
    model = ORTModelForCausalLM.from_pretrained(out, subfolder="onnx", file_name="model.onnx")
    (row,) = prompts([9])
    tokens = model.generate(row[None], max_new_tokens=32, do_sample=False)[0, 9:].tolist()
    assert tokens == gold_tokens(gold_model("moe"), row, 32)[: len(tokens)]
    assert len(tokens) > 16


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_answers(folder, precision):
    assert answer(folder, subfolder="onnx", file_name=PRECISIONS[precision].file) == "3 plus 4 is 7."


def test_the_only_file_needs_no_name(folder, tmp_path, caplog, monkeypatch):
    """Generation settings come from where config.json lies, though the file lies below."""
    for path in folder.rglob("*"):
        if path.is_file() and (path.parent == folder or "model_q4.onnx" in path.name):
            (tmp_path / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(folder))
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.25}))
    monkeypatch.setattr("optimum.onnxruntime.modeling.logger.propagate", True)
    monkeypatch.setattr(GenerationConfig, "from_pretrained", classmethod(_as_for_an_id))
    for options in ({}, {"subfolder": "onnx"}):
        model = ORTModelForCausalLM.from_pretrained(tmp_path, **options)
        assert Path(model.path).name == "model_q4.onnx"
        assert model.generation_config.repetition_penalty == 1.25
    assert caplog.records == []


def test_one_of_several_files_is_not_chosen_by_chance(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out", ignore=shutil.ignore_patterns("model.onnx*"))
    with pytest.raises(Lfm2Error, match=r"model_q4\.onnx.* Choose one"):
        ORTModelForCausalLM.from_pretrained(out)


def _as_for_an_id(cls, name, subfolder="", **kwargs):
    """Of a local folder transformers reads generation_config.json at the top whatever the subfolder; not on the Hub."""
    if subfolder:
        raise OSError(f"{name} has no {subfolder}/generation_config.json")
    return cls.from_dict(json.loads((Path(name) / "generation_config.json").read_text()))


def test_evaluate_reads_a_file_of_it(folder):
    quality = evaluate(folder / "onnx" / "model_q4f16.onnx", TRAINED, DEMO / "heldout.txt", chunks=2, length=128)
    assert 0.9 < quality.top1_agreement <= 1


# onnxruntime-genai


def genai_tokens(folder: Path) -> list[int]:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=story().shape[1] + 60)
    generator = og.Generator(model, params)
    generator.append_tokens(story().numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0)[story().shape[1] :].tolist()


@pytest.mark.parametrize("names", ["hub", "genai"])
def test_genai_runs_the_folder(names, gold_model, tmp_path):
    assert run("--model", TRAINED, tmp_path / "out", "--precisions", "fp32", "--cache-names", names) == 0
    decoder = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["filename"] == "onnx/model.onnx"
    assert decoder["inputs"]["past_conv_names"] == {"hub": "past_conv.%d", "genai": "past.%d.conv"}[names]
    assert decoder["outputs"]["present_conv_names"] == {"hub": "present_conv.%d", "genai": "present.%d.conv"}[names]
    gold = gold_tokens(gold_model("trained").float(), story()[0], 60)
    assert genai_tokens(tmp_path / "out") == gold
    out = ORTModelForCausalLM.from_pretrained(tmp_path / "out").generate(story(), max_new_tokens=60, do_sample=False)
    assert out[0, story().shape[1] :].tolist() == gold
    javascript = "```js" in (tmp_path / "out" / "README.md").read_text()
    assert javascript == (names == "hub")  # it knows the Hub's names alone


def test_export_onnx_with_the_names_of_genais_builder(gold_model, tmp_path):
    main_export(str(TRAINED), str(tmp_path), do_validation=False, model_kwargs={"cache_names": "genai"})
    inputs = [value.name for value in ir.load(tmp_path / "model.onnx").graph.inputs]
    assert inputs[2:5] == ["past.0.conv", "past.1.conv", "past_key_values.2.key"]
    assert genai_tokens(tmp_path) == gold_tokens(gold_model("trained").float(), story()[0], 60)


def test_genai_takes_what_a_cpu_runs_best(folder, small):
    for path in (folder, small):
        decoder = json.loads((path / "genai_config.json").read_text())["model"]["decoder"]
        assert decoder["filename"] == "onnx/model_q4.onnx"
    assert len(set(genai_tokens(folder))) > 15


# The card


def test_the_metadata(folder):
    data = ModelCard.load(folder / "README.md").data
    assert (data.base_model, data.license, data.pipeline_tag) == ("me/trained", "apache-2.0", "text-generation")
    assert {"lfm2", "onnx"} <= set(data.tags)
    assert data.library_name == "transformers.js"


def test_the_table_says_what_was_measured(folder):
    quality = evaluate(folder / "onnx" / "model_q4.onnx", TRAINED, DEMO / "heldout.txt", chunks=2, length=128)
    cells = rows(folder)
    assert list(cells) == list(PRECISIONS)
    assert cells["q4"][-3:] == [
        f"{quality.perplexity:.4f}",
        f"{quality.kl_divergence:.6f} ± {quality.kl_divergence_error:.6f}",
        f"{quality.top1_agreement:.2%}",
    ]
    differences = {name: float(row[4]) for name, row in cells.items()}
    assert 0 < differences["fp32"] < 1e-3 < differences["fp16"] < differences["q8"] < 1
    source = f"128 tokens of `heldout.txt`, where the checkpoint has a perplexity of {quality.reference_perplexity:.4f}"
    assert source in (folder / "README.md").read_text()


@pytest.mark.parametrize("index", range(3), ids=["optimum", "genai", "onnxruntime"])
def test_the_snippets_answer(index, folder, monkeypatch, capsys):
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 3
    if "onnxruntime_genai" in snippets[index]:
        pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    monkeypatch.chdir(folder.parent)
    exec(compile(snippets[index], "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "3 plus 4 is 7."


def test_the_checkpoints_own_card_gives_the_license(tmp_path):
    source = shutil.copytree(TRAINED, tmp_path / "source")
    fields = "license: other\nlicense_name: lfm1.0\nlicense_link: LICENSE\nbase_model: me/older\nlanguage: en"
    (source / "README.md").write_text(f"---\n{fields}\n---\n# Mine\n")
    (source / "LICENSE").write_text("as it is")
    options = ["--model", source, tmp_path / "out", "--precisions"]
    assert run(*options, "q8", "--repo-id", "me/lfm2-onnx") == 0
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "lfm1.0", "LICENSE")
    assert (data.base_model, data.language) == (None, "en")
    assert (tmp_path / "out" / "LICENSE").read_text() == "as it is"
    assert run(*options, "q4", "--base-model", "me/mine") == 0
    assert run(*options, "fp16") == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license_name, card.data.base_model) == ("lfm1.0", "me/mine")
    assert '= snapshot_download("me/lfm2-onnx")' in card.text  # as the first run said
    assert list(rows(tmp_path / "out")) == ["fp16", "q8", "q4"]


def test_a_checkpoint_without_a_chat_template(tmp_path, monkeypatch, capsys):
    source = shutil.copytree(TRAINED, tmp_path / "source")
    (source / "chat_template.jinja").unlink()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert run("--model", source, tmp_path / "out", "--precisions", "q8") == 0
    capsys.readouterr()
    text = (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    for snippet in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        if "onnxruntime_genai" in snippet and not find_spec("onnxruntime_genai"):
            continue
        exec(compile(snippet, "README.md", "exec"), {})
        assert len(capsys.readouterr().out.split()) > 10


# Another run


def test_a_second_run_adds_and_leaves_the_others(folder, tmp_path):
    out = tmp_path / "work" / "out"
    options = ["--model", TRAINED, out, "--precisions"]
    assert run(*options, "q4", *TEXT) == 0
    assert js_config(out) == {"use_external_data_format": {"model_q4.onnx": True}}
    config = json.loads((out / "config.json").read_text())
    config["transformers.js_config"]["dtype"] = "q4"  # a user's own word
    (out / "config.json").write_text(json.dumps(config))
    (out / "notes.txt").write_text("mine")
    before = tree(out)

    assert run(*options, "fp32") == 0
    after = tree(out)
    new = {"README.md", "config.json", "onnx/model.onnx", "onnx/model.onnx_data"}
    assert {name for name in after if before.get(name) != after[name]} == new
    assert js_config(out) == {"dtype": "q4", "use_external_data_format": {"model.onnx": True, "model_q4.onnx": True}}
    cells = rows(out)
    assert list(cells) == ["fp32", "q4"]
    assert cells["q4"] == rows(folder)["q4"]  # measured by the first run
    assert cells["fp32"][5:] != rows(folder)["fp32"][5:]  # by none
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_file_that_a_user_removed_is_not_declared(small):
    for path in small.glob("onnx/model_q4*"):
        path.unlink()
    assert run("--model", TRAINED, small, "--precisions", "q8") == 0
    assert js_config(small) == {"use_external_data_format": {"model.onnx": True, "model_quantized.onnx": True}}
    assert list(rows(small)) == ["fp32", "q8"]
    decoder = json.loads((small / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["filename"] == "onnx/model_quantized.onnx"


# What fails


def overflowing(folder: Path) -> Path:
    """The same function in fp32, with a weight that fp16 cannot hold."""
    source = shutil.copytree(TRAINED, folder / "overflowing")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.3"
    tensors[f"{name}.ffn_norm.weight"] *= 1e6
    for part in ("w1", "w3"):
        tensors[f"{name}.feed_forward.{part}.weight"] /= 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_a_precision_that_fails_is_not_left_behind(tmp_path, capfd):
    out = tmp_path / "work" / "out"
    assert run("--model", overflowing(tmp_path), out, "--precisions", "q8", "fp16") == 1
    err = capfd.readouterr().err
    assert err.startswith("optimum-cli: error: fp16: model.layers.3.ffn_norm.weight")
    assert err.count("\n") == 1
    assert sorted(path.name for path in (out / "onnx").iterdir()) == [
        "model_quantized.onnx",
        "model_quantized.onnx_data",
    ]
    assert js_config(out) == {"use_external_data_format": {"model_quantized.onnx": True}}
    assert list(rows(out)) == ["q8"]
    assert answer(out) == "3 plus 4 is 7."


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--atol", "0"], "q8: The file is wrong and was not kept"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", DEMO / "heldout.txt", "--length", "99999"], "Give more text"),
        (["--cache-names", "genai"], "by the convention hub"),
    ],
    ids=["wrong", "no text", "short text", "other names"],
)
def test_a_failed_run_leaves_the_folder_as_it_was(options, says, small, capfd):
    before = tree(small)
    capfd.readouterr()
    assert run("--model", TRAINED, small, "--precisions", "q8", *options) == 1
    err = capfd.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert tree(small) == before
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def _other_config(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-6}))
    return "norm_eps"


def _other_weights(source: Path) -> str:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.conv.in_proj.weight"][1] *= 1.5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return "other weights"


def _no_tokenizer(source: Path) -> str:
    for path in source.glob("tokenizer*"):
        path.unlink()
    return "no tokenizer"


def _no_head(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["Lfm2Model"]}))
    return "feature-extraction"


def _other_family(source: Path) -> str:
    (source / "config.json").write_text('{"model_type": "llama"}')
    return "llama"


@pytest.mark.parametrize("spoil", [_other_config, _other_weights, _no_tokenizer, _no_head, _other_family])
def test_a_checkpoint_that_does_not_belong_here_is_refused(spoil, small, tmp_path, capfd):
    source = shutil.copytree(TRAINED, tmp_path / "source")
    says = spoil(source)
    before = tree(small)
    capfd.readouterr()
    assert run("--model", source, small, "--precisions", "q8") == 1
    err = capfd.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert tree(small) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--precisions", "q4", "int3"], "--precisions int3: there are fp32, fp16, q8, q4, q4f16."),
        (["--cache-names", "mine"], "--cache-names mine: there are hub, genai."),
        (["--atol", "nan"], "--atol"),
    ],
)
def test_an_option_is_refused_before_any_work(options, says, tmp_path, capfd):
    assert run("--model", TRAINED, tmp_path / "out", *options) == 1
    assert says in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_and_another_layout_are_not_written_to(exported, tmp_path, capfd):
    source = shutil.copytree(TRAINED, tmp_path / "source")
    assert run("--model", source, source) == 1
    assert "is the checkpoint itself" in capfd.readouterr().err
    assert run("--model", TRAINED, exported("trained")) == 1
    assert "another layout" in capfd.readouterr().err


def test_help_teaches():
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "lfm2", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name, precision in PRECISIONS.items():
        assert re.search(rf"OUT/onnx/{re.escape(precision.file)} +{name} ", out)
    assert "examples:" in out
    assert "og.Model" in out
