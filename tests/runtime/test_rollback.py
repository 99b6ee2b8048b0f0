"""Taking tokens back: the cache must be as if they had never come."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from checkpoints import CHECKPOINTS, prompts
from optimum.onnxruntime import ORTModelForCausalLM

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime import record
from optimum_lfm2.runtime import rows as rows_module


HYBRIDS = ["hybrid", *(name for name in ("lfm3",) if name in CHECKPOINTS)]


@pytest.fixture(params=HYBRIDS)
def name(request) -> str:
    return request.param


@pytest.fixture(params=["columns", "replay", "alone", "copies"])
def model(request, name, exported) -> ORTModelForCausalLM:
    """A graph that gives columns, with io-binding or without; ours by default; one that is wrong on padding."""
    way = "replay" if request.param == "alone" else request.param
    options = {} if way == "replay" else {"model_kwargs": ROLLBACK}
    model = ORTModelForCausalLM.from_pretrained(exported(name, **options), use_io_binding=way != "copies")
    if request.param == "alone":
        model.layout = dataclasses.replace(model.layout, any_padding=False, in_place=False)
        model._connect()
    return model


class Options(dict):
    """Options that `exported` can remember."""

    def __hash__(self) -> int:
        return hash(tuple(self.items()))


ROLLBACK = Options(rollback="columns")


def continued(gold_model, name: str, texts: list[torch.Tensor]) -> torch.Tensor:
    """The logits of transformers after each whole text, one unpadded row at a time."""
    return torch.stack([gold_model(name)(input_ids=text[None], use_cache=False).logits[0, -1] for text in texts])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("masks", "count"), [("visible", 2), ("padded", 4), ("holes", 3)])
def test_rows_go_on_as_if_nothing_had_been_taken_back(count, masks, batch, name, model, gold_model):
    """Six tokens in one call, of which some are taken back; twice. A graph takes several rows one by one."""
    rows, tries, after = (prompts([length] * 2, seed=seed)[:batch] for length, seed in ((11, 1), (6, 3), (3, 4)))
    shown = {
        "visible": [[1] * 11 + [1] * 6, [1] * 17],
        "padded": [[1] * 17, [0] * 4 + [1] * 13],
        "holes": [[1] * 11 + [1, 0, 1, 1, 0, 1], [1] * 9 + [0, 0] + [0, 1, 1, 0, 1, 0]],
    }[masks]
    mask = torch.tensor(shown[:batch])
    cache = model(torch.stack(rows), attention_mask=mask[:, :11]).past_key_values
    cache.activate_past_recording()
    model(torch.stack(tries), attention_mask=mask, past_key_values=cache)
    cache.crop(-count)
    assert cache.get_seq_length() == 17 - count
    model(torch.stack(tries)[:, 6 - count :], attention_mask=mask, past_key_values=cache)
    cache.crop(-count)  # once more, from a call that began with tokens to be run again
    assert cache.get_seq_length() == 17 - count
    left = mask[:, : 17 - count]
    new = torch.cat([left, torch.ones(batch, 3, dtype=torch.int64)], dim=1)
    logits = model(torch.stack(after), attention_mask=new, past_key_values=cache).logits
    assert logits.shape[1] == 3, "those of tokens that are run again are nobody's"
    texts = [
        torch.cat([row, own])[: 17 - count][left[i] == 1] for i, (row, own) in enumerate(zip(rows, tries, strict=True))
    ]
    whole = [torch.cat([text, own]) for text, own in zip(texts, after, strict=True)]
    golds = continued(gold_model, name, whole)
    assert batch == 1 or not torch.allclose(golds[0], golds[1], atol=1e-2)
    torch.testing.assert_close(logits[:, -1], golds, atol=1e-4, rtol=0)


def test_into_calls_that_are_joined(name, model, gold_model, monkeypatch):
    monkeypatch.setattr(record, "MOST_POINTS", 3)
    (text,) = prompts([14])
    cache = model._graph.new_cache(1)
    cache.activate_past_recording()
    for i in range(0, 14, 2):
        model(text[None, i : i + 2], past_key_values=cache)
    assert len(cache.record.points) == 3
    cache.crop(-7)
    assert (cache.record.pending is None) == model.layout.gives_columns, "the columns of all calls are joined"
    (gold,) = continued(gold_model, name, [torch.cat([text[:7], torch.tensor([20])])])
    logits = model(torch.tensor([[20]]), past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(logits, gold, atol=1e-4, rtol=0)


@pytest.mark.parametrize("back", [2, 5, 14])
def test_over_several_calls_and_into_a_prompt_of_several_chunks(back, name, model, gold_model, monkeypatch):
    """As a drafting model does: tokens one by one. There are more calls than points; a copy goes on too."""
    monkeypatch.setattr(rows_module, "PREFILL_CHUNK", 4)
    monkeypatch.setattr(record, "MOST_POINTS", 3)
    (text,) = prompts([17])
    cache = model._graph.new_cache(1)
    cache.activate_past_recording()
    model(text[None, :10], past_key_values=cache)
    for i in range(10, 17):
        model(text[None, i : i + 1], past_key_values=cache)
    cache.crop(-back)
    twin = copy.deepcopy(cache)
    (gold,) = continued(gold_model, name, [torch.cat([text[: 17 - back], torch.tensor([20, 30])])])
    for own in (twin, cache):
        assert own.get_seq_length() == 17 - back
        model(torch.tensor([[20]]), past_key_values=own)
        logits = model(torch.tensor([[30]]), past_key_values=own).logits[0, -1]
        torch.testing.assert_close(logits, gold, atol=1e-4, rtol=0)
        assert own.length == own.get_seq_length() == 19 - back


@pytest.mark.parametrize("keep", [2, 4])
def test_what_is_run_again_is_bounded(keep, exported, monkeypatch):
    """Candidates that fail every time, and a prompt with candidates after it."""
    model = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
    calls: list[int] = []
    run = model._graph.run
    monkeypatch.setattr(model._graph, "run", lambda ids, *args: (calls.append(ids.shape[1]), run(ids, *args))[1])
    cache = model._graph.new_cache(1)
    cache.activate_past_recording()
    (text,) = prompts([60])
    model(text[None, : 40 + keep], past_key_values=cache, logits_to_keep=keep)
    cache.crop(1 - keep)
    for i in range(41, 56):
        assert model(text[None, i : i + keep], past_key_values=cache, logits_to_keep=keep).logits.shape[1] == keep
        cache.crop(1 - keep)
    assert calls[:2] == [40, keep]
    assert max(calls[1:]) <= rows_module.RUN_AGAIN + keep
    assert cache.get_seq_length() == 56


def test_a_failed_call_leaves_pending_tokens_pending(exported, gold_model, monkeypatch):
    model = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
    (text,) = prompts([9])
    cache = model._graph.new_cache(1)
    cache.activate_past_recording()
    model(text[None, :4], past_key_values=cache)
    model(text[None, 4:], past_key_values=cache)
    cache.crop(-2)
    with monkeypatch.context() as patched:
        patched.setattr(model._graph, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.tensor([[20]]), past_key_values=cache)
    assert cache.get_seq_length() == 7
    logits = model(torch.tensor([[20]]), past_key_values=cache).logits[:, -1]
    gold = continued(gold_model, "hybrid", [torch.cat([text[:7], torch.tensor([20])])])
    torch.testing.assert_close(logits, gold, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lefts", [(9, 7), (9, 5)])
def test_taken_back_twice_in_a_row(lefts, exported, gold_model):
    """The second time from tokens that have to be run again: some of them, or all."""
    model, (text,) = ORTModelForCausalLM.from_pretrained(exported("hybrid")), prompts([11])
    cache = model(text[None, :5]).past_key_values
    cache.activate_past_recording()
    model(text[None, 5:], past_key_values=cache)
    for left in lefts:
        cache.crop(left)
        assert cache.get_seq_length() == left
    logits = model(torch.tensor([[20, 30]]), past_key_values=cache, logits_to_keep=1).logits
    assert logits.shape[1] == 1
    gold = continued(gold_model, "hybrid", [torch.cat([text[: lefts[-1]], torch.tensor([20, 30])])])
    torch.testing.assert_close(logits[:, -1], gold, atol=1e-4, rtol=0)


@pytest.mark.parametrize("second", [[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]], ids=["visible", "a hole"])
@pytest.mark.parametrize("first", [[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("calls", [1, 2])
def test_recorded_from_the_first_token_on(calls, first, second, name, model, gold_model):
    """The first call may have several rows, the second one runs them one by one. Masked tokens are in no state."""
    rows, mask = torch.stack(prompts([12, 12])), torch.tensor([[*first, *second], [1] * 12])
    cache = model._graph.new_cache(2)
    cache.activate_past_recording()
    for call in range(calls):
        end = 6 * (call + 1)
        model(rows[:, end - 6 : end], attention_mask=mask[:, :end], past_key_values=cache)
    cache.crop(-2)
    left = 6 * calls - 2
    after = torch.cat([mask[:, :left], torch.ones(2, 1, dtype=torch.int64)], dim=1)
    logits = model(torch.full((2, 1), 20), attention_mask=after, past_key_values=cache).logits[:, -1]
    texts = [torch.cat([row[:left][own[:left] == 1], torch.tensor([20])]) for row, own in zip(rows, mask, strict=True)]
    torch.testing.assert_close(logits, continued(gold_model, name, texts), atol=1e-4, rtol=0)


def test_before_rows_were_taken_apart(exported, gold_model):
    """A graph that is wrong on padding runs rows together until padding comes."""
    model = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
    model.layout = dataclasses.replace(model.layout, any_padding=False, in_place=False)
    model._connect()
    rows = torch.stack(prompts([10, 10]))
    cache = model._graph.new_cache(2)
    cache.activate_past_recording()
    model(rows[:, :6], past_key_values=cache)
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, 7] = 0
    model(rows[:, 6:], attention_mask=mask, past_key_values=cache)
    cache.crop(-7)
    logits = model(torch.full((2, 1), 20), past_key_values=cache).logits[:, -1]
    golds = continued(gold_model, "hybrid", [torch.cat([row[:3], torch.tensor([20])]) for row in rows])
    torch.testing.assert_close(logits, golds, atol=1e-4, rtol=0)


def test_calls_with_columns_and_without_are_joined(exported, gold_model, monkeypatch):
    """A call of several chunks leaves none. To activate recording again forgets nothing."""
    monkeypatch.setattr(record, "MOST_POINTS", 2)
    monkeypatch.setattr(rows_module, "PREFILL_CHUNK", 4)
    model, (text,) = ORTModelForCausalLM.from_pretrained(exported("hybrid", model_kwargs=ROLLBACK)), prompts([12])
    cache = model._graph.new_cache(1)
    for start, end in ((0, 2), (2, 8), (8, 10), (10, 12)):
        cache.activate_past_recording()
        model(text[None, start:end], past_key_values=cache)
    cache.crop(-7)
    logits = model(torch.tensor([[20]]), past_key_values=cache).logits[:, -1]
    gold = continued(gold_model, "hybrid", [torch.cat([text[:5], torch.tensor([20])])])
    torch.testing.assert_close(logits, gold, atol=1e-4, rtol=0)


def test_rows_that_change_places_with_pending_tokens(exported, gold_model):
    model = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
    rows = prompts([9, 9])
    cache = model(torch.stack(rows)[:, :5]).past_key_values
    cache.activate_past_recording()
    model(torch.stack(rows)[:, 5:], past_key_values=cache)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    logits = model(torch.full((3, 1), 20), past_key_values=cache).logits[:, -1]
    golds = continued(gold_model, "hybrid", [torch.cat([rows[i][:7], torch.tensor([20])]) for i in (1, 0, 1)])
    torch.testing.assert_close(logits, golds, atol=1e-4, rtol=0)


def test_what_cannot_be_taken_back_says_why(exported):
    model = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
    cache = model(torch.tensor([[9, 8, 7]])).past_key_values
    assert cache.is_croppable
    cache.crop(3)
    cache.crop(5)
    for back in (2, -1):
        with pytest.raises(Lfm2Error, match="activate_past_recording"):
            cache.crop(back)
    assert not cache.record.recording, "to crop is not to record"
    cache.activate_past_recording()
    model(torch.tensor([[9, 8]]), past_key_values=cache)
    with pytest.raises(Lfm2Error, match=r"crop\(-6\) takes back more tokens than the 5"):
        cache.crop(-6)
    with pytest.raises(Lfm2Error, match="cache of 5 tokens cannot be cropped to 2"):
        cache.crop(2)
    model(torch.tensor([[9, 8]]), past_key_values=cache)
    cache.reorder_cache(torch.tensor([0, 0]))
    with pytest.raises(Lfm2Error, match="cannot be cropped to 6"):
        cache.crop(-1)


def test_what_was_recorded_is_forgotten_once_tokens_are_taken_back(exported):
    model, (text,) = ORTModelForCausalLM.from_pretrained(exported("hybrid")), prompts([11])
    cache = model._graph.new_cache(1)
    cache.activate_past_recording()
    model(text[None, :5], past_key_values=cache)
    model(text[None, 5:], past_key_values=cache)
    cache.crop(9)
    with pytest.raises(Lfm2Error, match="cache of 9 tokens cannot be cropped to 3"):
        cache.crop(3)


@pytest.mark.parametrize(("tokens", "left"), [(0, 3 if compat.CROPS_BY_NUMBER else 0), (1, 1)])
def test_zero_is_what_it_is_to_transformers_and_one_is_a_length(tokens, left, exported):
    model = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
    cache = model._graph.new_cache(1)
    cache.activate_past_recording()
    model(torch.tensor([[9, 8, 7]]), past_key_values=cache)
    cache.crop(tokens)
    assert cache.get_seq_length() == left


def test_the_file_that_gives_columns(checkpoint, exported, cli, tmp_path):
    """It is validated, keeps the order that others go by, and a default file has no such output."""
    code, err = cli(
        "export", "onnx", "--model", checkpoint("hybrid"), tmp_path, "--model-kwargs", '{"rollback":"columns"}'
    )
    assert code == 0, err
    given, usual = (ORTModelForCausalLM.from_pretrained(folder).layout for folder in (tmp_path, exported("hybrid")))
    assert given.gives_columns
    for use_io_binding in (True, False):
        model = ORTModelForCausalLM.from_pretrained(tmp_path, use_io_binding=use_io_binding)
        cache = model(torch.tensor([[9, 8]])).past_key_values
        assert cache.record.columns is None, "they are of use to a cache that records"
        cache.activate_past_recording()
        model(torch.tensor([[7, 6, 5]]), past_key_values=cache)
        cache.crop(-2)
        assert (cache.get_seq_length(), cache.record.pending) == (3, None), "nothing is run again"
    assert not usual.gives_columns
    assert given.outputs[: len(usual.outputs)] == usual.outputs
    assert given.outputs[len(usual.outputs) :] == tuple(f"columns_conv.{i}" for i in (0, 1, 3))
    code, err = cli(
        "export", "onnx", "--model", checkpoint("hybrid"), tmp_path / "other", "--task", "text-generation",
        "--model-kwargs", '{"rollback":"columns"}',
    )  # fmt: skip
    assert code == 1
    assert "--task text-generation-with-past" in err
