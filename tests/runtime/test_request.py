"""What a call asks for is decided before any work: ids, mask and cache fit each other, or one line says why not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from checkpoints import prompts
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import BatchEncoding

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.request import Request


GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
IDS = prompts([9])[0][None]
ONES = torch.ones(1, 9, dtype=torch.int64)


@pytest.fixture(scope="module")
def model(exported) -> ORTModelForCausalLM:
    return ORTModelForCausalLM.from_pretrained(exported("hybrid"))


@pytest.fixture
def no_work(model, monkeypatch) -> None:
    monkeypatch.setattr(model._graph, "run", lambda *_: pytest.fail("work has begun"))


def refused(call, says: str) -> None:
    with pytest.raises(Lfm2Error, match=says) as error:
        call()
    assert "\n" not in str(error.value)


class Seen:
    """A cache that has seen so many tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def test_every_length_of_ids_mask_and_cache():
    """The ids are the whole text, or what follows the cache. Nothing else fits, and something is new."""
    taken = 0
    for given in range(1, 6):
        for seen in range(7):
            for width in (None, *range(1, 12)):
                mask = None if width is None else torch.ones(1, width, dtype=torch.int64)
                total = given if width is None else width
                fits = total > seen and (total - given) in (0, seen)
                try:
                    request = Request.of(torch.ones(1, given, dtype=torch.int64), mask, Seen(seen) if seen else None)
                except Lfm2Error:
                    assert not fits, (given, seen, width)
                else:
                    assert fits, (given, seen, width)
                    assert (request.total, request.new, request.before) == (total, total - seen, total - given)
                    taken += 1
    assert taken > 50


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (BatchEncoding({"input_ids": IDS}), r"input_ids is a BatchEncoding.*generate\(\*\*inputs\)"),
        ({"input_ids": IDS}, "input_ids is a dict"),
        (IDS.tolist(), 'input_ids is a list.*return_tensors="pt"'),
        (IDS.numpy(), "input_ids is a ndarray"),
        (IDS > 9, "torch.bool; it needs integers"),
        (IDS.to(torch.complex64), "complex64; it needs integers"),
        (IDS.float(), "float32; it needs integers"),
        (IDS[0], r"the shape \(9,\)"),
        (IDS[:, :0], r"the shape \(1, 0\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ids(ids, says, model, no_work):
    for call in (lambda: model.generate(ids, **GREEDY), lambda: model.generate(input_ids=ids, **GREEDY)):
        refused(call, says)
    refused(lambda: model(ids), says)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (ONES.tolist(), "attention_mask is a list"),
        (ONES.numpy(), "attention_mask is a ndarray"),
        (ONES[0], r"attention_mask has the shape \(9,\)"),
        (ONES[None], r"attention_mask has the shape \(1, 1, 9\)"),
        (ONES.to(torch.complex64), "complex64; it needs numbers"),
        (ONES[:, :5], r"the shape \(1, 5\).*needs \(1, 9\)"),
        (torch.ones(1, 12), r"the shape \(1, 12\).*needs \(1, 9\)"),
        (torch.ones(2, 9), r"the shape \(2, 9\).*needs \(1, 9\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_masks(mask, says, model, no_work):
    refused(lambda: model.generate(IDS, attention_mask=mask, **GREEDY), says)
    refused(lambda: model(IDS, attention_mask=mask), says.split(".*")[0])


def test_what_does_not_fit_the_cache(model, monkeypatch):
    cache = model(IDS, return_dict=False)[1]
    longer = prompts([14])[0][None]
    monkeypatch.setattr(model._graph, "run", lambda *_: pytest.fail("work has begun"))
    for ids, mask, says in (
        (IDS, None, "has 9 tokens, and the cache has seen 9: nothing is new"),
        (IDS, ONES, "nothing is new"),
        (IDS[:, :3], None, r"has 3 tokens, and the cache has seen 9.*all 9 \+ 3 columns"),
        (longer, torch.ones(1, 11), r"needs \(1, 14\).*or \(1, 23\), if the 9 tokens of the cache come before them"),
        (longer[:, :2], torch.ones(1, 10), r"needs \(1, 2\).*or \(1, 11\)"),
    ):
        refused(lambda ids=ids, mask=mask: model.generate(ids, attention_mask=mask, cache=cache, **GREEDY), says)
    two = copy.deepcopy(cache)
    two.batch_repeat_interleave(2)
    refused(lambda: model.generate(longer, cache=two, **GREEDY), "cache has 2 rows, and the call 1")
    refused(lambda: model.generate(longer, cache=cache, num_beams=2, **GREEDY), "cache has 1 rows, and the call 2")
    assert cache.get_seq_length() == 9


def test_settings(model, no_work):
    for settings, says in (
        ({"prefill_chunk_size": 0}, "prefill_chunk_size is 0"),
        ({"prefill_chunk_size": -3}, "prefill_chunk_size is -3"),
        ({"prefill_chunk_size": 2.0}, "prefill_chunk_size is 2.0"),
        ({"prefill_chunk_size": 2, "use_cache": False}, "prefill_chunk_size needs a cache"),
        ({"input_ids": IDS}, "two names for one argument"),
        ({"inputs_embeds": torch.zeros(1, 9, 64)}, "inputs_embeds cannot be used"),
        ({"cache_implementation": "paged"}, "Continuous batching"),
        ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep is no argument of generate"),
        (
            {"guidance_scale": 2.0, "negative_prompt_ids": IDS, "negative_prompt_attention_mask": 1 - ONES},
            "negative_prompt_ids end in padding",
        ),
    ):
        refused(lambda settings=settings: model.generate(IDS, **{**GREEDY, **settings}), says)
    with pytest.raises(ValueError, match="last_token_only"):  # as any name that transformers does not know
        model.generate(IDS, last_token_only=True, **GREEDY)
    with pytest.raises(TypeError):
        model.generate(IDS, None, inputs=IDS)
    for call in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        refused(lambda call=call: call([[9, 8]]), "Continuous batching")


def test_which_logits_are_kept(model):
    logits = model(IDS).logits
    for keep in (np.int64(3), torch.tensor(3), 3):
        assert torch.equal(model(IDS, logits_to_keep=keep).logits, logits[:, -3:])
    assert torch.equal(model(IDS, logits_to_keep=torch.tensor([2, -1])).logits, logits[:, [2, -1]])
    for keep in (2.0, "2", None, -1, np.int64(-1), [1], torch.tensor([9]), torch.tensor([-10]), torch.tensor([[1]])):
        refused(lambda keep=keep: model(IDS, logits_to_keep=keep), "logits_to_keep")


def test_where_a_model_can_be(model):
    assert model.to("cpu").to(torch.float32).to(device="cpu", dtype=torch.float32).device.type == "cpu"
    for target, says in (
        ("meta", "no model on meta"),
        (torch.device("mps"), "mps"),
        (torch.float16, "keeps its dtype"),
    ):
        refused(lambda target=target: model.to(target), says)
    refused(lambda: model.to(dtype=torch.bfloat16), "keeps its dtype")
    refused(lambda: model.to("nowhere"), "no model on nowhere")
    folder = model.model_save_dir
    for dtype in (torch.float16, "bfloat16"):
        refused(lambda dtype=dtype: ORTModelForCausalLM.from_pretrained(folder, dtype=dtype), "keeps its dtype")
    for dtype in (torch.float32, "float32", "auto", None):
        assert ORTModelForCausalLM.from_pretrained(folder, dtype=dtype).dtype == torch.float32
    assert model.device.type == "cpu"


def test_a_text_that_begins_with_the_start_token(model):
    """Without ids, transformers begins with it."""
    start = torch.tensor([[1]])
    expected = model.generate(start, **GREEDY)
    assert torch.equal(model.generate(bos_token_id=1, **GREEDY), expected)
    cache = model(start, return_dict=False)[1]
    refused(lambda: model.generate(bos_token_id=1, cache=cache, **GREEDY), "nothing is new")


@pytest.mark.parametrize("size", [1, 4, 100])
def test_chunks_are_as_long_as_they_are_asked_for(size, model, monkeypatch):
    calls: list[int] = []
    run = model._graph.run
    monkeypatch.setattr(model._graph, "run", lambda ids, *args: (calls.append(ids.shape[1]), run(ids, *args))[1])
    settings = {**GREEDY, "prefill_chunk_size": size}
    model.generate(IDS, **settings)
    assert calls[: -(GREEDY["max_new_tokens"] - 1)] == [len(part) for part in IDS[0].split(size)]
    model.generation_config.prefill_chunk_size = size
    try:
        calls.clear()
        model.generate(IDS, **GREEDY)
        assert max(calls) == min(size, 9)
    finally:
        model.generation_config.prefill_chunk_size = None


def test_the_pipeline_does_not_say_that_it_is_not_supported(exported, caplog, monkeypatch):
    import logging

    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

    class Other(GPT2LMHeadModel):
        pass

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    own = ORTModelForCausalLM.from_pretrained(exported("trained"))
    tokenizer = AutoTokenizer.from_pretrained(exported("trained"))
    pipeline("text-generation", model=own, tokenizer=tokenizer)
    assert "not supported" not in caplog.text
    other = Other(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    pipeline("text-generation", model=other, tokenizer=tokenizer)
    assert "'Other' is not supported" in caplog.text
