"""An exported embedding model in sentence-transformers, unchanged; an exported ColBERT by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import make_encoder
from embedding import TEXTS, TRANSFORMER, VOCABULARY, make_embedding, module, states_alone, write
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForFeatureExtraction
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks.checkpoint import add_tokenizer
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.loading.modules import find_modules


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
