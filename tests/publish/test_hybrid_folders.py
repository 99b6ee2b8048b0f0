"""What `optimum-cli export lfm2` writes for Granite 4.0 H and Olmo-Hybrid."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from checkpoints import prompts
from publishing import rows

from optimum_lfm2.quality.evaluate import evaluate


TITLES = {"granite": "Granite 4.0 H", "olmo": "Olmo-Hybrid"}


# A release for each, since a folder takes long: transformers 4 has no Olmo-Hybrid.
@pytest.fixture(params=[pytest.param("granite", marks=pytest.mark.once), "olmo"])
def name(request) -> str:
    return request.param


@pytest.fixture
def folder(name, hybrid_folder) -> Path:
    return hybrid_folder(name)


@pytest.fixture
def card(folder) -> str:
    return (folder / "README.md").read_text()


def test_the_card_names_the_model_and_its_runtimes(name, card):
    assert f"A checkpoint of {TITLES[name]} for ONNX Runtime" in card
    assert "LFM2 checkpoint" not in card
    assert ("- onnxruntime-genai" in card) == (name == "granite")
    assert ("no olmo_hybrid" in card) == (name == "olmo")
    assert "docs/olmo_hybrid.md" not in card, "there is no such page"
    assert "- transformers.js" in card


def test_the_quality_of_each_precision(folder):
    """Float in 32 bits is transformers' own. A factor of the logits that one side lacks shows here."""
    loss = {precision: cells[6] for precision, cells in rows(folder).items()}
    assert loss.keys() == {"fp32", "fp16", "q8", "q4"}
    assert loss["fp32"] == "none that shows"
    assert loss["fp16"] in ("none that shows", "next to none")


def test_evaluate_says_what_the_card_says(folder):
    file, source, text = folder / "onnx" / "model_quantized.onnx", folder.parent / "checkpoint", folder.parent / "text"
    found = evaluate(file, source, text, 2, 32)
    assert f"{found.perplexity:.4f}" == rows(folder)["q8"][7]
    assert 0 < found.kl_divergence < 0.3


def test_the_cards_empty_caches_have_the_dtypes_of_the_graph(folder, card):
    """A file in half precision has recurrent states in float32."""
    snippet = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[-1]
    lines = re.search(r"pasts = .*?\ncaches = [^\n]*\n", snippet, flags=re.DOTALL)[0]
    (row,) = prompts([9])

    def logits(file: str) -> np.ndarray:
        session = onnxruntime.InferenceSession(folder / "onnx" / file, providers=["CPUExecutionProvider"])
        scope = {"np": np, "session": session}
        exec(lines, scope)
        feeds = {"input_ids": row[None].numpy(), "attention_mask": np.ones((1, 9), np.int64)}
        feeds["num_logits_to_keep"] = np.array(0)
        feeds |= {past.name: cache for past, cache in zip(scope["pasts"], scope["caches"], strict=True)}
        return session.run(["logits"], feeds)[0]

    np.testing.assert_allclose(logits("model_fp16.onnx"), logits("model.onnx"), atol=0.03)
