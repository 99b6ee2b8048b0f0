"""The model card of a published folder has measured figures, and its snippets run."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec

import pytest
from huggingface_hub import ModelCard
from publishing import DEMO, TRAINED, rows, run

from optimum_lfm2.publish import card
from optimum_lfm2.publish.precisions import DEFAULT
from optimum_lfm2.quality.evaluate import evaluate


def test_the_metadata(hub_folder):
    data = ModelCard.load(hub_folder / "README.md").data
    assert (data.base_model, data.license, data.pipeline_tag) == ("me/trained", "apache-2.0", "text-generation")
    assert {"lfm2", "onnx"} <= set(data.tags)
    assert data.library_name == "transformers.js"


def test_the_table_says_what_was_measured(hub_folder):
    quality = evaluate(hub_folder / "onnx" / "model_q4.onnx", TRAINED, DEMO / "heldout.txt", chunks=2, length=128)
    cells = rows(hub_folder)
    assert list(cells) == list(DEFAULT)
    assert cells["q4"][-3:] == [
        f"{quality.perplexity:.4f}",
        f"{quality.kl_divergence:.6f} ± {quality.kl_divergence_error:.6f}",
        f"{quality.top1_agreement:.2%}",
    ]
    differences = {name: float(row[4]) for name, row in cells.items()}
    assert 0 < differences["fp32"] < 1e-4 < differences["fp16"] < 0.02
    assert 0 < differences["q8"] < 1e-3
    assert (cells["fp32"][6], cells["q8"][6], cells["q4"][6]) == ("none that shows", "next to none", "slight")
    source = f"128 tokens of `heldout.txt`, where the checkpoint has a perplexity of {quality.reference_perplexity:.4f}"
    assert source in (hub_folder / "README.md").read_text()


@pytest.mark.parametrize("index", range(3), ids=["optimum", "genai", "onnxruntime"])
def test_the_snippets_answer(index, hub_folder, monkeypatch, capsys):
    snippets = re.findall(r"```python\n(.*?)```", (hub_folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 3
    if "onnxruntime_genai" in snippets[index]:
        pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    monkeypatch.chdir(hub_folder.parent)
    exec(compile(snippets[index], "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "3 plus 4 is 7."


@pytest.mark.once
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
    assert '= snapshot_download("me/lfm2-onnx")' in card.text  # the first run set this id
    assert list(rows(tmp_path / "out")) == ["fp16", "q8", "q4"]


@pytest.mark.once
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


def test_a_licence_that_links_out_of_the_checkpoint_is_not_copied(tmp_path):
    checkpoint, secret = tmp_path / "checkpoint", tmp_path / "secret"
    checkpoint.mkdir()
    secret.write_text("private")
    (checkpoint / "LICENSE").symlink_to(secret)
    assert not card._is_of(checkpoint / "LICENSE", str(checkpoint))
    assert card._is_of(checkpoint / "README.md", str(checkpoint))
    snapshot, blob = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs" / "def"
    for folder in (snapshot, blob.parent):
        folder.mkdir(parents=True)
    blob.write_text("Apache")
    (snapshot / "LICENSE").symlink_to(blob)
    assert card._is_of(snapshot / "LICENSE", str(snapshot))
