"""The order in which a call takes new tokens, and rows alone for graphs that padding would mislead."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from checkpoints import gold_tokens, prompts
from optimum.onnxruntime import ORTModelForCausalLM

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime import rows as rows_module
from optimum_lfm2.runtime.rows import contiguous_order


GREEDY = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}


def fits(new: list[int], past: int) -> bool:
    """Unmasked tokens contiguous, with nothing before them on a full cache: said in another way than the code does."""
    text = "".join(map(str, new)).rstrip("0")
    return "0" not in (text if past else text.lstrip("0"))


@pytest.mark.parametrize("past", [0, 3])
def test_every_mask_of_five_tokens(past):
    for new in itertools.product([0, 1], repeat=5):
        mask = torch.tensor([[1] * past + list(new)])
        order = contiguous_order(mask, past)
        if fits(list(new), past):
            assert order is None, new
        else:
            visible, hidden = mask[0, past:].nonzero()[:, 0], (mask[0, past:] == 0).nonzero()[:, 0]
            assert order[0].tolist() == [*visible.tolist(), *hidden.tolist()]


def test_one_row_decides_for_all():
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    assert contiguous_order(mask, 0).tolist() == [[0, 1, 2], [0, 2, 1]]


def taken_for_foreign(folder) -> ORTModelForCausalLM:
    """Our graph, taken for one that says nothing of itself."""
    model = ORTModelForCausalLM.from_pretrained(folder)
    model.layout = dataclasses.replace(model.layout, any_padding=False, in_place=False)
    model._connect()
    return model


@pytest.fixture
def foreign(exported):
    return taken_for_foreign(exported("hybrid"))


def batch(lengths: list[int], width: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    rows = prompts(lengths)
    ids, mask = torch.full((len(rows), width), 9), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return rows, {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"use_cache": False}], ids=str)
def test_padded_rows_run_alone(settings, side, foreign, gold_model):
    rows, inputs = batch([9, 1, 12, 5], 12)
    if side == "right":
        inputs = {
            name: torch.stack([values.roll(len(row)) for values, row in zip(tensor, rows, strict=True)])
            for name, tensor in inputs.items()
        }
    golds = [
        gold_model("hybrid").generate(row[None], use_cache=False, **GREEDY, num_beams=settings.get("num_beams", 1))
        for row in rows
    ]
    out = foreign.generate(**inputs, **GREEDY, **settings)[:, 12:]
    assert out.tolist() == [gold[0, len(row) :].tolist() for gold, row in zip(golds, rows, strict=True)]


def test_it_says_so_once(foreign, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(rows_module.logger, "info", said.append)
    _, inputs = batch([9, 4], 9)
    foreign.generate(**inputs, **GREEDY)
    assert len(said) == 1
    assert "one by one" in said[0]


def test_unpadded_rows_run_together(foreign, gold_model, monkeypatch):
    rows = prompts([7, 7])
    monkeypatch.setattr(foreign._rows, "_run_alone", lambda *args: pytest.fail("no row has padding"))
    out = foreign.generate(torch.stack(rows), **GREEDY)[:, 7:].tolist()
    assert out == [gold_tokens(gold_model("hybrid"), row, 16) for row in rows]


@pytest.mark.parametrize("task", ["text-generation-with-past", "text-generation"])
def test_logits_of_padded_rows(task, exported, gold_model):
    foreign, (rows, inputs) = taken_for_foreign(exported("hybrid", task=task)), batch([9, 3], 9)
    logits = foreign(**inputs).logits
    for i, row in enumerate(rows):
        expected = gold_model("hybrid")(input_ids=row[None]).logits[0]
        torch.testing.assert_close(logits[i, 9 - len(row) :], expected, atol=1e-4, rtol=0)
    for keep in (1, 4):
        torch.testing.assert_close(foreign(**inputs, logits_to_keep=keep).logits, logits[:, -keep:], atol=1e-5, rtol=0)


def test_rows_on_a_cache_of_one_token(exported, gold_model):
    model, rows = ORTModelForCausalLM.from_pretrained(exported("hybrid")), prompts([4, 4])
    cache = model(torch.stack(rows)[:, :1]).past_key_values
    logits = model(torch.stack(rows)[:, 1:], past_key_values=cache).logits
    for own, row in zip(logits, rows, strict=True):
        expected = gold_model("hybrid")(input_ids=row[None]).logits[0, 1:]
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_logits_of_the_last_tokens_of_rows_with_holes(keep, exported, gold_model):
    model, rows = ORTModelForCausalLM.from_pretrained(exported("hybrid")), torch.stack(prompts([7, 7]))
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 1]])
    logits = model(rows, attention_mask=mask, logits_to_keep=keep).logits
    assert logits.shape[1] == keep
    for own, row, seen in zip(logits, rows, mask == 1, strict=True):
        expected = gold_model("hybrid")(input_ids=row[seen][None]).logits[0]
        kept = int(seen[-keep:].sum())
        torch.testing.assert_close(own[seen[-keep:]], expected[-kept:], atol=1e-4, rtol=0)


def test_the_last_tokens_logits_alone(exported):
    """`generate` asks for them where rows are padded on the right."""
    model, other = (ORTModelForCausalLM.from_pretrained(exported(name)) for name in ("hybrid", "multi_query"))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    ids, cache = torch.stack(prompts([4, 4])), model._graph.new_cache(2)
    for length in (4, 8):
        logits = model._rows.run_to_last(ids, mask.repeat(1, length // 4), cache, io_binding=True)
        assert logits.shape[:2] == (2, 1)
        assert cache.get_seq_length() == length
    with pytest.raises(Lfm2Error, match="another model"):
        other._rows.run_to_last(ids, mask.repeat(1, 3), cache, io_binding=True)


def test_rows_that_a_call_takes_together_take_one_call(exported, monkeypatch):
    model, calls = ORTModelForCausalLM.from_pretrained(exported("hybrid")), []
    run = model._graph.run
    monkeypatch.setattr(model._graph, "run", lambda *args: calls.append(1) or run(*args))
    _, inputs = batch([9, 3, 5], 9)
    out = model(**inputs)
    assert len(calls) == 1
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], dim=1)
    model(torch.tensor([[9], [8], [7]]), attention_mask=mask, past_key_values=out.past_key_values)
    assert len(calls) == 2


def test_rows_alone_are_repeated_and_selected(foreign, gold_model):
    rows, inputs = batch([9, 3], 9)
    out, mask = foreign(**inputs), torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
    cache = out.past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    order = [1, 0, 0]
    logits = foreign(torch.full((3, 1), 20), attention_mask=mask[order], past_key_values=cache).logits[:, -1]
    for own, i in zip(logits, order, strict=True):
        expected = gold_model("hybrid")(input_ids=torch.cat([rows[i], torch.tensor([20])])[None]).logits[0, -1]
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=0)


def test_hiding_what_was_shown(foreign):
    _, inputs = batch([9, 3], 9)
    out = foreign(**inputs)
    mask = torch.ones(2, 10, dtype=torch.int64)
    with pytest.raises(Lfm2Error, match="cannot forget them"):
        foreign(torch.tensor([[9], [9]]), attention_mask=mask, past_key_values=out.past_key_values)
    with pytest.raises(Lfm2Error, match="hides every token"):
        foreign(torch.tensor([[9, 9]]), attention_mask=torch.zeros(1, 2, dtype=torch.int64))
