"""An exported embedding model in sentence-transformers, unchanged; an exported ColBERT by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
import torch.nn.functional as F
from checkpoints import encoder_gold, make_encoder, make_headless
from embedding import PROMPTS, TEXTS, TRANSFORMER, VOCABULARY, make_embedding, module, states_alone, write
from gguf_files import write_gguf
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForFeatureExtraction
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks.checkpoint import add_tokenizer
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.loading.modules import find_modules
from optimum_lfm2.loading.notices import warn_once
from optimum_lfm2.loading.tasks_manager import Lfm2TasksManager


@pytest.fixture(scope="module")
def embedding(tmp_path_factory) -> Path:
    return make_embedding(tmp_path_factory.mktemp("embedding"))


@pytest.fixture(scope="module")
def out(embedding, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    main_export(str(embedding), folder)
    return folder


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_folder_opens_unchanged(batch_size, embedding, out):
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(out), backend="onnx")
    vectors = model.encode(TEXTS, prompt_name="query", batch_size=batch_size, convert_to_tensor=True)
    expected = torch.stack(
        [F.normalize(states[0], dim=0) for states in states_alone(embedding, [f"query: {t}" for t in TEXTS])]
    )
    assert torch.pdist(expected).min() > 0.01, "vectors that are all the same prove nothing"
    torch.testing.assert_close(vectors.cpu(), expected, atol=1e-4, rtol=0)
    documents = model.encode(TEXTS, prompt_name="document", convert_to_tensor=True)
    assert (documents - vectors).abs().max() > 1e-2, "the prompts change nothing"


def test_a_dense_layer_of_every_token_is_carried_along(embedding, tmp_path):
    """ColBERT: the MaxSim that the exported folder gives is that of the reference."""
    source = tmp_path / "colbert"
    add_tokenizer(make_encoder("encoder", tmp_path, vocab_size=VOCABULARY).rename(source))
    write(source / "modules.json", [TRANSFORMER, module(1, "Dense", "pylate")])
    settings = {"in_features": 64, "out_features": 16, "bias": False}
    write(source / "1_Dense" / "config.json", {**settings, "activation_function": "torch.nn.modules.linear.Identity"})
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    save_file({"linear.weight": weight}, source / "1_Dense" / "model.safetensors")
    main_export(str(source), tmp_path / "out")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", padding_side="right")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    states = ORTModelForFeatureExtraction.from_pretrained(tmp_path / "out")(**batch).last_hidden_state
    dense = load_file(tmp_path / "out" / "1_Dense" / "model.safetensors")["linear.weight"]

    def vectors(states: torch.Tensor) -> torch.Tensor:
        return F.normalize(states @ dense.T, dim=-1)

    def scores(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(rows[0] @ row.T).max(1).values.sum() for row in rows])

    own = [vectors(row[mask.bool()]) for row, mask in zip(states, batch["attention_mask"], strict=True)]
    expected = scores([vectors(row) for row in states_alone(source, TEXTS)])
    torch.testing.assert_close(scores(own), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1


def test_a_gguf_file_with_pooling_and_a_dense_layer(embedding, cli, tmp_path, caplog):
    """The gold is the checkpoint, without sentence-transformers."""
    library = pytest.importorskip("sentence_transformers")
    model = encoder_gold(embedding, "feature-extraction")
    named = {f"model.{name.removeprefix('model.')}": value for name, value in model.state_dict().items()}
    model.config.intermediate_size = len(named["model.layers.0.feed_forward.w1.weight"])  # a file has the final one
    dense = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType.MEAN)
        writer.add_embedding_length_out(16)
        writer.add_tensor("dense_2.weight", dense.numpy())

    whole: Any = SimpleNamespace(config=model.config, state_dict=lambda: named)
    write_gguf(whole, tmp_path / "x.gguf", lambda name: "F32", changes=describe)
    code, error = cli("export", "onnx", "--model", tmp_path / "x.gguf", "--tokenizer", embedding, tmp_path / "out")
    assert code == 0, error
    assert "not used" not in caplog.text
    own = library.SentenceTransformer(str(tmp_path / "out"), backend="onnx").encode(TEXTS, convert_to_tensor=True)
    expected = torch.stack([dense @ states.mean(0) for states in states_alone(embedding, TEXTS)])
    assert torch.pdist(expected).min() > 0.01, "vectors that are all the same prove nothing"
    torch.testing.assert_close(own.cpu(), expected, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """A decoder without a head, with pooling and a dense layer, as fine-tunes of `Lfm2Model` have them."""
    path = tmp_path_factory.mktemp("decoder") / "source"
    add_tokenizer(make_headless(path, vocab_size=VOCABULARY))
    modules = [module(1, "Pooling"), module(2, "Dense"), module(3, "Normalize")]
    write(path / "modules.json", [TRANSFORMER, *modules])
    write(path / "1_Pooling" / "config.json", {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True})
    settings = {"in_features": 64, "out_features": 16, "activation_function": "torch.nn.modules.activation.Tanh"}
    write(path / "2_Dense" / "config.json", settings)
    generator = torch.Generator().manual_seed(0)
    dense = {"linear.weight": torch.randn(16, 64, generator=generator), "linear.bias": torch.randn(16)}
    save_file(dense, path / "2_Dense" / "model.safetensors")
    write(path / "config_sentence_transformers.json", {"prompts": PROMPTS, "default_prompt_name": None})
    return path


def test_a_decoder_without_a_head(decoder, tmp_path):
    """The gold is sentence-transformers with transformers' own model, each text alone."""
    library = pytest.importorskip("sentence_transformers")
    main_export(str(decoder), tmp_path)
    gold, ours = library.SentenceTransformer(str(decoder)), library.SentenceTransformer(str(tmp_path), backend="onnx")
    for prompt in PROMPTS:
        expected = torch.cat([gold.encode([text], prompt_name=prompt, convert_to_tensor=True) for text in TEXTS])
        assert torch.pdist(expected).min() > 0.01, "vectors that are all the same prove nothing"
        for batch_size in (1, 3):
            vectors = ours.encode(TEXTS, prompt_name=prompt, batch_size=batch_size, convert_to_tensor=True)
            torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=0)


def test_a_decoder_of_pylate(decoder, tmp_path):
    source = shutil.copytree(decoder, tmp_path / "source")
    write(source / "modules.json", [TRANSFORMER, module(2, "Dense", "pylate")])
    main_export(str(source), tmp_path / "out", do_validation=False)
    for name in ("modules.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_decoder_that_predicts_tokens_is_told_of(decoder, tmp_path, caplog):
    warn_once.cache_clear()
    Lfm2TasksManager.get_model_from_task("text-generation", str(decoder), library_name="transformers")
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("optimum_lfm2")]
    assert "modules.json" in line
    assert "--task feature-extraction" in line


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"type": "custom_module.Head"}, "custom_module.Head"),
        ({"path": "../elsewhere"}, "outside the checkpoint"),
    ],
)
def test_modules_that_are_not_carried(change, says, embedding, tmp_path):
    write(tmp_path / "modules.json", [TRANSFORMER, module(1, "Pooling") | change])
    with pytest.raises(Lfm2Error, match=says):
        find_modules(str(tmp_path))
