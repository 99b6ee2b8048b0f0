"""Generation with experts gives transformers' tokens of a row alone, in batches, chunks, chats and beams."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from checkpoints import MOE_CHECKPOINTS, gold_tokens, prompts
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from test_modeling import GREEDY, NEW, decode, pad

from benchmarks.checkpoint import add_tokenizer
from optimum_lfm2 import ORTLfm2ForCausalLM, compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import lfm2_moe
from optimum_lfm2.quality.evaluate import evaluate
from optimum_lfm2.quality.scoring import load, scored
from optimum_lfm2.weights.experts import MoeCheckpoint


LENGTHS = (9, 1, 30)


@pytest.fixture(scope="module")
def golds(gold_model) -> list[list[int]]:
    return [gold_tokens(gold_model("moe"), row, NEW) for row in prompts(list(LENGTHS))]


@pytest.fixture(params=["default", "q4"])
def model(request, exported) -> ORTLfm2ForCausalLM:
    return ORTModelForCausalLM.from_pretrained(exported("moe", _variant=request.param))


@pytest.mark.parametrize("name", MOE_CHECKPOINTS)
def test_the_golds_of_the_table_route_to_most_experts(name, gold_model):
    """Golds that used few experts would test little of the router."""
    model, used = gold_model(name), set()
    hooks = [
        module.register_forward_hook(lambda module, taken, given: used.update(given[2].flatten().tolist()))
        for module_name, module in model.named_modules()
        if module_name.endswith("feed_forward.gate")
    ]
    for row in prompts(list(LENGTHS)):
        gold_tokens(model, row, NEW)
    for hook in hooks:
        hook.remove()
    assert len(hooks) == model.config.num_hidden_layers - model.config.num_dense_layers
    assert len(used) >= 0.8 * model.config.num_experts


def test_rows_alone_and_padded_and_chunked(model):
    """The gold of a row is what the same export generates for it alone, so 4-bit weights have one too."""
    rows = prompts(list(LENGTHS))
    alone = [model.generate(row[None], **GREEDY)[0, len(row) :].tolist() for row in rows]
    batch = pad(rows, "left")
    assert model.generate(**batch, **GREEDY)[:, 30:].tolist() == alone
    assert model.generate(**batch, prefill_chunk_size=7, **GREEDY)[:, 30:].tolist() == alone
    right = pad(rows, "right")
    out = model(**right)
    first = out.logits[torch.arange(3), right["attention_mask"].sum(1) - 1].argmax(-1)
    assert decode(model, out, right["attention_mask"], first, NEW) == alone


def test_a_chat_goes_on_from_its_cache(exported, gold_model, golds):
    model = ORTModelForCausalLM.from_pretrained(exported("moe"))
    turn = prompts(list(LENGTHS))[0]
    out = model.generate(turn[None], return_dict_in_generate=True, **GREEDY)
    assert out.sequences[0, len(turn) :].tolist() == golds[0]
    chat = torch.cat([out.sequences[0], prompts([11], seed=5)[0]])
    again = model.generate(chat[None], past_key_values=copy.deepcopy(out.past_key_values), **GREEDY)
    assert again[0, len(chat) :].tolist() == gold_tokens(gold_model("moe"), chat, NEW)


def test_beams_of_padded_rows(exported, gold_model):
    model, rows = ORTModelForCausalLM.from_pretrained(exported("moe")), prompts(list(LENGTHS))
    golds = [gold_model("moe").generate(row[None], use_cache=False, num_beams=3, **GREEDY)[0] for row in rows]
    out = model.generate(**pad(rows, "left"), num_beams=3, **GREEDY)
    assert out[:, 30:].tolist() == [gold[len(row) :].tolist() for gold, row in zip(golds, rows, strict=True)]


def test_evaluate(checkpoint, tmp_path):
    source = add_tokenizer(shutil.copytree(checkpoint("moe"), tmp_path / "source"))
    text = tmp_path / "text"
    text.write_text("qjxzvkqzxj" * 20)  # letters that make no longer token: those end at 255 here
    main_export(str(source), tmp_path / "out", do_validation=False)
    quality = evaluate(tmp_path / "out", source, text, chunks=2, length=32)
    assert quality.kl_divergence < 1e-9
    assert quality.top1_agreement == 1


@pytest.mark.skipif(not compat.TRANSFORMERS_5, reason="transformers 4 has no lfm2_moe")
def test_a_reference_is_read_by_layers_and_experts(checkpoint, gold_model, monkeypatch):
    """Three passes through the weights serve all chunks, and leave none in memory. A second request reads nothing."""
    monkeypatch.setattr("optimum_lfm2.quality.scoring.TOKENS_A_PASS", 70)
    reads, read = [], MoeCheckpoint._expert
    monkeypatch.setattr(MoeCheckpoint, "_expert", lambda self, *args: reads.append(args) or read(self, *args))
    chunks = [row[None] for row in prompts([32] * 5)]
    reference = load(checkpoint("moe"))
    for ids, logits in zip(chunks * 2, [*reference(chunks), *reference(chunks)], strict=True):
        gold = gold_model("moe")(input_ids=ids, logits_to_keep=scored(ids)).logits[0]
        assert logits.shape == gold.shape == (17, 256)
        torch.testing.assert_close(logits, gold, rtol=0, atol=1e-5)
    assert all(parameter.is_meta for parameter in reference._model.parameters())
    layers = gold_model("moe").config.num_hidden_layers - gold_model("moe").config.num_dense_layers
    assert max(reads.count(one) for one in reads) == 3
    assert len(set(reads)) <= layers * 2 * gold_model("moe").config.num_experts


@pytest.mark.parametrize("variant", ["default", "q8", "q4"])
def test_onnxruntime_genai(variant, checkpoint, golds, tmp_path):
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    source = add_tokenizer(shutil.copytree(checkpoint("moe"), tmp_path / "source"))
    main_export(str(source), tmp_path / "out", do_validation=False, _variant=variant)
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["type"] == "lfm2_moe"
    rows = prompts(list(LENGTHS))
    if variant != "default":
        own = ORTModelForCausalLM.from_pretrained(tmp_path / "out")
        golds = [own.generate(row[None], **GREEDY)[0, len(row) :].tolist() for row in rows]
    model = og.Model(str(tmp_path / "out"))
    for row, gold in zip(rows, golds, strict=True):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(row) + NEW, min_length=len(row) + NEW)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array([row.tolist()], dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.get_sequence(0)[len(row) :].tolist() == gold


def test_more_experts_a_token_than_there_are():
    config = {"model_type": "lfm2_moe", "num_experts": 2, "num_experts_per_tok": 3}
    with pytest.raises(Lfm2Error, match="num_experts_per_tok is 3, but num_experts 2"):
        lfm2_moe.MEMBER.check(config)
