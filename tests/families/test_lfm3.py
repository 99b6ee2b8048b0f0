"""LFM3: the tests of `test_modeling.py` over its windows, and what it has besides."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from checkpoints import LFM3_CHECKPOINTS, gold_tokens, make_checkpoint, prompts
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from safetensors.torch import load_file, save_file
from test_modeling import (  # noqa: F401  tests and fixtures, which run here over the checkpoints below
    GREEDY,
    NEW,
    decode,
    either,
    model,
    pad,
    test_a_graph_without_cache_generates,
    test_a_mask_with_holes,
    test_batch_is_its_rows_alone_with_and_without_io_binding,
    test_beams,
    test_beams_of_padded_rows,
    test_chat_goes_on_from_the_returned_cache,
    test_chats_of_several_rows_with_padding_in_every_turn,
    test_chunked_prefill,
    test_forward_with_and_without_past,
    test_io_binding_can_change_in_the_middle,
    test_long_prompts_run_in_chunks_of_their_own,
    test_right_padding_then_decoding,
)
from transformers import AutoModelForCausalLM

from benchmarks.checkpoint import add_tokenizer
from optimum_lfm2 import compat, reference_cache
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import lfm3
from optimum_lfm2.quality.evaluate import evaluate
from optimum_lfm2.quality.quantize_cache import quantize_cache
from optimum_lfm2.validation.decoder import errors_as_they_are


LENGTHS = (9, 1, 30)
needs_lfm3 = pytest.mark.skipif("lfm3" in compat.STAND_INS, reason="this transformers has no lfm3")


# Prompts reach 30 tokens and answers 32: several windows each, but for the last.
@pytest.fixture(
    scope="module", params=["lfm3", "lfm3_window_1", "lfm3_odd_head_dim", "lfm3_window_longer_than_the_text"]
)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def exported(name, exported):
    """The checkpoint in turn, where the tests ask for `hybrid`."""
    return lambda _, **options: exported(name, **options)


@pytest.fixture(scope="module")
def gold_model(name, gold_model):
    return lambda _: gold_model(name)


@pytest.fixture(scope="module")
def gold(gold_model):
    @cache
    def gold(length: int) -> tuple[torch.Tensor, list[int]]:
        (prompt,) = prompts([length])
        return prompt, gold_tokens(gold_model("hybrid"), prompt, NEW)

    return gold


def test_a_window_keeps_its_width(model, name):  # noqa: F811
    """The layer costs the same after any number of tokens; that the tokens are right is tested above."""
    window = LFM3_CHECKPOINTS[name].get("sliding_window", 8)
    out = model(input_ids=torch.cat(prompts([90] * 2))[None])
    cache = out[compat.CACHE]
    widths = {tensor.past: cache.tensors[tensor.past].shape[2] for tensor in cache.layout.caches}
    assert widths["past_key_values.1.key"] == widths["past_key_values.4.value"] == window
    assert widths["past_key_values.2.key"] >= 180


@needs_lfm3
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 1}, {"head_dim": 12}], ids=repr)
def test_transformers_own_cache_gives_the_gold(changes, tmp_path):
    """The reference of validation: a row on transformers' cache, in pieces, equals the row without one."""
    reference = AutoModelForCausalLM.from_pretrained(make_checkpoint("lfm3", tmp_path, **changes)).eval()
    (row,) = prompts([30])
    cache, parts = reference_cache.hybrid_cache(reference, [], None), []
    with torch.no_grad():
        for start, end in ((0, 13), (13, 14), (14, 30)):
            parts.append(reference_cache.call(reference, row[None, start:end], cache, start))
        expected = reference(input_ids=row[None], use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)


@needs_lfm3
def test_validation_sees_a_window_that_is_shifted(tmp_path, monkeypatch):
    source = make_checkpoint("lfm3", tmp_path / "source")
    real = lfm3.sliding_call

    def shifted(call, rotary, config):
        shared = real(call, rotary, config)
        return replace(shared, bias=shared.bias.roll(1, dims=-1))

    with errors_as_they_are():
        main_export(str(source), tmp_path / "right")
    monkeypatch.setattr(lfm3, "sliding_call", shifted)
    with pytest.raises(Lfm2Error, match="differs from transformers"), errors_as_they_are():
        main_export(str(source), tmp_path / "wrong")


@needs_lfm3
@pytest.mark.parametrize("variant", ["q4", "q8"])
def test_quantised_rows_alone_and_padded(variant, tmp_path):
    """What a row gets alone is its gold, but for activations whose rounding to int8 falls the other way."""
    with errors_as_they_are():
        main_export(str(make_checkpoint("lfm3", tmp_path)), tmp_path / "out", _variant=variant)
    bits = {
        node.inputs[1].name: node.attributes.get_int("bits")
        for node in ir.load(tmp_path / "out" / "model.onnx").graph
        if node.op_type == "MatMulNBits"
    }
    assert {bits[name] for name in bits if ".conv." in name or "lm_head" in name or "embed" in name} == {8}
    others = {bits[name] for name in bits if ".feed_forward." in name or ".self_attn." in name}
    assert others == {4 if variant == "q4" else 8}
    quantised, rows = ORTModelForCausalLM.from_pretrained(tmp_path / "out"), prompts(list(LENGTHS))
    batch = quantised(**pad(rows, "left")).logits
    for i, row in enumerate(rows):
        alone = quantised(input_ids=row[None]).logits[0]
        first = quantised(input_ids=row[None, :1])
        cached = [first.logits[0]]
        if len(row) > 1:
            cached.append(quantised(input_ids=row[None, 1:], **{compat.CACHE: first[compat.CACHE]}).logits[0])
        torch.testing.assert_close(batch[i, 30 - len(row) :], alone, atol=0.05, rtol=0)
        torch.testing.assert_close(torch.cat(cached), alone, atol=0.05, rtol=0)


@pytest.fixture(scope="module")
def with_tokenizer(checkpoint, tmp_path_factory) -> Path:
    return add_tokenizer(shutil.copytree(checkpoint("lfm3"), tmp_path_factory.mktemp("lfm3") / "checkpoint"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("qjxzvkqzxj" * 20)  # letters that make no longer token: the model has only 256 ids
    return path


@needs_lfm3
def test_caches_that_grow_and_then_in_8_bits(with_tokenizer, text, checkpoint, tmp_path):
    """Where all keys are kept, a mask hides what the window does not see."""
    with errors_as_they_are():
        main_export(str(with_tokenizer), tmp_path, model_kwargs={"sliding_cache": "growing"})
    grown, rows = ORTModelForCausalLM.from_pretrained(tmp_path), prompts(list(LENGTHS))
    reference = AutoModelForCausalLM.from_pretrained(checkpoint("lfm3")).eval()
    golds = [gold_tokens(reference, row, NEW) for row in rows]
    left, right = pad(rows, "left"), pad(rows, "right")
    assert grown.generate(**left, **GREEDY)[:, 30:].tolist() == golds
    assert grown.generate(**left, prefill_chunk_size=7, **GREEDY)[:, 30:].tolist() == golds
    out = grown(**right)
    first = out.logits[torch.arange(3), right["attention_mask"].sum(1) - 1].argmax(-1)
    assert decode(grown, out, right["attention_mask"], first, NEW) == golds
    assert all(tensor.grows for tensor in out[compat.CACHE].layout.caches if tensor.role.name != "conv")
    _, target, quality = quantize_cache(tmp_path, text, chunks=4, length=32)
    assert quality.kl_divergence < 0.05
    assert set(past_dtypes(target).values()) == {ir.DataType.INT8, ir.DataType.FLOAT}


@needs_lfm3
def test_evaluate_and_the_cache_in_8_bits(with_tokenizer, text, tmp_path):
    """The keys and values that grow are stored in 8 bits, a window stays as it is."""
    main_export(str(with_tokenizer), tmp_path, do_validation=False)
    quality = evaluate(tmp_path, with_tokenizer, text, chunks=2, length=32)
    assert quality.kl_divergence < 1e-9
    assert quality.top1_agreement == 1
    _, target, quality = quantize_cache(tmp_path, text, chunks=4, length=32)
    assert 0 < quality.kl_divergence < 0.05
    types = past_dtypes(target)
    assert {name for name, dtype in types.items() if dtype == ir.DataType.INT8} == {
        "past_key_values.2.key",
        "past_key_values.2.value",
    }
    rounded, rows = ORTModelForCausalLM.from_pretrained(tmp_path, file_name=target.name), prompts(list(LENGTHS))
    alone = [rounded.generate(row[None], **GREEDY)[0, len(row) :].tolist() for row in rows]
    assert rounded.generate(**pad(rows, "left"), **GREEDY)[:, 30:].tolist() == alone


def past_dtypes(file: Path) -> dict[str, ir.DataType]:
    return {value.name: value.dtype for value in ir.load(file).graph.inputs if value.name.startswith("past")}


@needs_lfm3
def test_half_precision(tmp_path):
    with errors_as_they_are():
        main_export(str(make_checkpoint("lfm3", tmp_path)), tmp_path / "out", dtype="fp16")


@needs_lfm3
def test_a_checkpoint_under_transformers_own_names(tmp_path):
    """Files call the gate's projection `gate_proj`, but one may have the name of the module."""
    source = make_checkpoint("lfm3", tmp_path)
    main_export(str(source), tmp_path / "one", do_validation=False)
    weights = load_file(source / "model.safetensors")
    renamed = {key.replace(".gate_proj.", ".g_proj."): value for key, value in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    main_export(str(source), tmp_path / "two", do_validation=False)
    assert (tmp_path / "one" / "model.onnx_data").read_bytes() == (tmp_path / "two" / "model.onnx_data").read_bytes()


@needs_lfm3
@pytest.mark.parametrize("window", [None, 0])
def test_a_window_that_is_none(window, tmp_path):
    source = make_checkpoint("lfm3", tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
    with pytest.raises(Lfm2Error, match=f"sliding_window in config.json is {window}"):
        main_export(str(source), tmp_path / "out")


@needs_lfm3
def test_a_rope_that_depends_on_the_prompt(tmp_path):
    """Each kind of layer has its own rope: all are looked at."""
    ropes = json.loads((make_checkpoint("lfm3", tmp_path) / "config.json").read_text())["rope_parameters"]
    ropes["sliding_attention"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    path = tmp_path / "lfm3" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": ropes}))
    with pytest.raises(Lfm2Error, match="asks for dynamic"):
        main_export(str(tmp_path / "lfm3"), tmp_path / "out")
