"""Arguments of `forward` and `generate`: what transformers heeds is honoured or refused."""

from __future__ import annotations

import pytest
import torch
from checkpoints import gold_tokens, prompts
from optimum.onnxruntime import ORTModelForCausalLM

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error


GREEDY = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model(exported) -> ORTModelForCausalLM:
    return ORTModelForCausalLM.from_pretrained(exported("hybrid"))


@pytest.mark.parametrize("shown", [torch.tensor(True), torch.tensor(2), torch.tensor(0.5)], ids=str)
def test_whatever_is_not_0_in_a_mask_shows_a_token(shown, model, gold_model):
    row = prompts([9])[0]
    ids, mask = torch.cat([torch.full((3,), 9), row])[None], torch.zeros(1, 12, dtype=shown.dtype)
    mask[0, 3:] = shown
    with torch.no_grad():
        expected = gold_model("hybrid")(input_ids=row[None], use_cache=False).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 3:], expected, atol=1e-4, rtol=0)


def test_columns_of_the_cache(model):
    """The forward of transformers 5 takes no `cache_position`, and ignores what its forward does not take."""
    ids, more = prompts([9])[0][None], torch.tensor([[20, 30]])
    cache = model(ids, cache_position=torch.arange(9), return_dict=False)[1]
    model(more, past_key_values=cache, cache_position=torch.tensor([9, 10]))
    wrong = torch.tensor([9, 10])  # of the columns 11 and 12
    if compat.HEEDS_CACHE_POSITION:
        with pytest.raises(Lfm2Error, match="cache_position has to be 11 to 12"):
            model(more, past_key_values=cache, cache_position=wrong)
    else:
        model(more, past_key_values=cache, cache_position=wrong)


def test_positions_without_a_row(model):
    with pytest.raises(Lfm2Error, match="position_ids"):
        model(torch.tensor([[9]]), position_ids=torch.tensor([0]))


def test_a_negative_number_of_logits(model):
    with pytest.raises(Lfm2Error, match="logits_to_keep is -1"):
        model(prompts([4])[0][None], logits_to_keep=-1)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_by_either_name(name, model):
    ids = prompts([5])[0][None]
    expected = model(ids).logits[:, -1]
    cache = model(ids[:, :4])[-1]
    logits = model(ids[:, 4:], **{name: cache}).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == 5
    cache.batch_repeat_interleave(2)
    assert not cache.record.recording, "to repeat rows is not to record"


def test_two_different_caches(model):
    ids, token = prompts([4])[0][None], torch.tensor([[9]])
    one, other = (model(ids, return_dict=False)[1] for _ in range(2))
    for call in (model.forward, lambda ids, **caches: model.generate(ids, **caches, **GREEDY)):
        with pytest.raises(Lfm2Error, match="two names for one"):
            call(token, past_key_values=one, cache=other)
    model(token, past_key_values=one, cache=one)
    assert one.get_seq_length() == 5


def test_what_the_forward_of_transformers_ignores(model):
    """optimum-onnx's own tests hand settings of `generate` to `forward`."""
    ids = prompts([9])[0][None]
    expected = model(ids).logits
    assert torch.equal(model(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, num_beams=1).logits, expected)


def test_a_cache_that_generate_is_told_not_to_use(model, gold_model):
    """As transformers, which goes on from it all the same."""
    row, reply = prompts([9, 4])
    cache = model(row[None], return_dict=False)[1]
    chat = torch.cat([row, reply])
    out = model.generate(chat[None], past_key_values=cache, use_cache=False, **GREEDY)
    assert out[0, 13:].tolist() == gold_tokens(gold_model("hybrid"), chat, 16)


def test_guidance_reads_the_prompt_twice(model, gold_model):
    """Its processor calls the model itself, with a second cache."""
    prompt, settings = prompts([9])[0][None], {**GREEDY, "guidance_scale": 1.5}
    expected = gold_model("hybrid").generate(prompt, use_cache=False, **settings)
    assert model.generate(prompt, **settings).tolist() == expected.tolist()
    assert expected.tolist() != model.generate(prompt, **GREEDY).tolist()


def test_ids_outside_the_vocabulary(model):
    for before in ([], [9]):  # a single token, as in decode, and several
        model(input_ids=torch.tensor([[*before, 0]]))
        model(input_ids=torch.tensor([[*before, 255]]))
        for bad in (-1, 256):
            with pytest.raises(Lfm2Error, match="outside the vocabulary of 256"):
                model(input_ids=torch.tensor([[*before, bad]]))


def test_mask_of_another_length(model):
    with pytest.raises(Lfm2Error, match=r"needs \(1, 3\)"):
        model(input_ids=torch.tensor([[9, 8, 7]]), attention_mask=torch.ones(1, 4, dtype=torch.int64))
    cache = model(input_ids=torch.tensor([[9, 8, 7]])).past_key_values
    with pytest.raises(Lfm2Error, match="3 cached and 1 new"):
        model(torch.tensor([[9]]), attention_mask=torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)


def test_prompt_too_long(model):
    with pytest.raises(Lfm2Error, match="takes 512"):
        model(input_ids=torch.full((1, 513), 9))
    cache = model(input_ids=torch.full((1, 512), 9)).past_key_values
    with pytest.raises(Lfm2Error, match="has 514 tokens; the model takes 512"):
        model(torch.tensor([[9, 8]]), past_key_values=cache)
    cache.activate_past_recording()
    with pytest.raises(Lfm2Error, match="has 514 tokens; the model takes 512"):
        model(torch.tensor([[9, 8]]), past_key_values=cache)
    cache.stop_recording()
    # Single tokens go on, as in transformers.
    assert model(torch.tensor([[9]]), past_key_values=cache).logits.shape[1] == 1


@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 100}], ids=str)
def test_a_prompt_of_generate_too_long(settings, model):
    settings = {**GREEDY, "max_new_tokens": 3, **settings}
    text = torch.randint(8, 256, (1, 513), generator=torch.Generator().manual_seed(0))
    for recording in (False, True):
        cache = model(text[:, :500]).past_key_values
        if recording:
            cache.activate_past_recording()
        for given in ({}, {"past_key_values": cache}, {"attention_mask": torch.ones_like(text)}):
            with pytest.raises(Lfm2Error, match="has 513 tokens; the model takes 512"):
                model.generate(text, **given, **settings)
    expected = model.generate(text[:, 1:], **settings)
    assert expected.shape[1] == 515, "what follows the prompt goes on, as in transformers"
    mask = torch.ones_like(text)
    mask[:, 0] = 0
    assert torch.equal(model.generate(text, attention_mask=mask, **settings)[:, 1:], expected), (
        "hidden ones do not count"
    )
    assert model(text, attention_mask=mask, logits_to_keep=1).logits.shape[1] == 1


def test_rows_that_do_not_fit_the_cache(model):
    cache = model(input_ids=torch.tensor([[9, 8, 7]])).past_key_values
    with pytest.raises(Lfm2Error, match="2 rows, but the cache has 1"):
        model(input_ids=torch.tensor([[9], [8]]), past_key_values=cache)


def test_a_cache_of_another_kind(model):
    with pytest.raises(Lfm2Error, match="tuple"):
        model(input_ids=torch.tensor([[9]]), past_key_values=((torch.zeros(1),),))


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_what_a_graph_does_not_give(name, model):
    with pytest.raises(Lfm2Error, match=name):
        model(input_ids=torch.tensor([[9]]), **{name: True})


def test_inputs_for_a_step_without_a_mask(model):
    """A loop of the caller's own may leave the mask out: then no token is hidden."""
    ids = prompts([5])[0][None]
    cache = model(ids[:, :3])[-1]
    inputs = model.prepare_inputs_for_generation(ids, past_key_values=cache)
    assert inputs["input_ids"].tolist() == ids[:, 3:].tolist()
    torch.testing.assert_close(model(**inputs).logits, model(ids).logits[:, 3:], atol=1e-4, rtol=0)
