"""A head and an embedding: both stored, one of them stored, and flags at the level that another release reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import changed_copy, prompts
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from pictures import gold_vl_model, make_vl_checkpoint
from transformers import AutoModelForCausalLM

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration, compat
from optimum_lfm2.validation.decoder import errors_as_they_are


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None]).logits


def lines_on(caplog, name: str) -> list[str]:
    """The lines of ours that name a tensor."""
    return [r.message for r in caplog.records if r.name.startswith("optimum_lfm2") and name in r.message]


def export(source: Path, out: Path) -> Path:
    with errors_as_they_are():
        main_export(str(source), out)
    return out


def head_of_its_own(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors[HEAD] = torch.randn(tensors[EMBEDDING].shape, generator=generator) * 0.1


def test_two_heads_where_the_configuration_ties_them(checkpoint, tmp_path, caplog):
    """Transformers 4.57 drops the head, and 5.24 keeps it. An export does the same, and says so."""
    source = changed_copy(checkpoint("hybrid"), tmp_path, head_of_its_own)
    out = export(source, tmp_path / "out")
    (line,) = lines_on(caplog, HEAD)
    assert "\n" not in line
    (ids,) = prompts([20])
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    gold = logits_of(model, ids)
    kept = not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert kept == compat.KEEPS_BOTH_HEADS
    torch.testing.assert_close(ORTModelForCausalLM.from_pretrained(out)(ids[None]).logits, gold, atol=1e-4, rtol=0)
    assert json.loads((out / "config.json").read_text()).get("tie_word_embeddings", True) != kept


def test_a_copy_of_the_embedding_is_no_second_head(checkpoint, tmp_path, caplog):
    source = changed_copy(checkpoint("hybrid"), tmp_path, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    export(source, tmp_path / "out")
    assert not lines_on(caplog, HEAD)
    data = [(tmp_path / "out" / "model.onnx_data").stat().st_size]
    export(checkpoint("hybrid"), tmp_path / "tied")
    assert data == [(tmp_path / "tied" / "model.onnx_data").stat().st_size]


def test_a_tied_checkpoint_that_stores_the_head_alone(checkpoint, tmp_path):
    """Transformers 5.24 reads the embedding there; 4.57 has it at random."""
    source = changed_copy(checkpoint("hybrid"), tmp_path, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    out = export(source, tmp_path / "out")
    (ids,) = prompts([20])
    gold = logits_of(AutoModelForCausalLM.from_pretrained(checkpoint("hybrid")).eval(), ids)
    torch.testing.assert_close(ORTModelForCausalLM.from_pretrained(out)(ids[None]).logits, gold, atol=1e-4, rtol=0)
    if compat.KEEPS_BOTH_HEADS:
        own = logits_of(AutoModelForCausalLM.from_pretrained(source).eval(), ids)
        torch.testing.assert_close(own, gold, atol=1e-5, rtol=0)


@pytest.mark.parametrize("place", ["text_config", "top"])
def test_an_untied_model_of_pictures_of_the_other_release(place, tmp_path):
    """Transformers 4.57 reads and writes the flag in text_config alone, and 5.24 at the top."""
    source = make_vl_checkpoint(tmp_path / "source")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        (shape,) = (value.shape for name, value in tensors.items() if name.endswith("embed_tokens.weight"))
        tensors[HEAD] = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.1

    head = changed_copy(source, tmp_path, add)
    path = head / "config.json"
    config = json.loads(path.read_text())
    for level in (config, config["text_config"]):
        level.pop("tie_word_embeddings", None)
        level.pop("tie_embedding", None)
    (config["text_config"] if place == "text_config" else config)["tie_word_embeddings"] = False
    path.write_text(json.dumps(config))
    out = export(head, tmp_path / "out")
    gold_model, (ids,) = gold_vl_model(head), prompts([20], vocab_size=200)
    own = ORTLfm2VlForConditionalGeneration.from_pretrained(out)(input_ids=ids[None]).logits
    torch.testing.assert_close(own, logits_of(gold_model, ids), atol=1e-3, rtol=0)
