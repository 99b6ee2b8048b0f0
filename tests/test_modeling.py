"""`ORTLfm2ForCausalLM` against transformers alone: one unpadded row at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import CHECKPOINTS, gold_tokens, prompts
from optimum.onnxruntime import ORTModelForCausalLM
from optimum.pipelines import pipeline
from transformers import AutoTokenizer, GenerationConfig, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from optimum_lfm2 import ORTLfm2ForCausalLM, compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime import rows
from optimum_lfm2.runtime.cache import Lfm2Cache


NEW = 32
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model(exported) -> ORTLfm2ForCausalLM:
    return ORTModelForCausalLM.from_pretrained(exported("hybrid"))


@pytest.fixture(params=[True, False], ids=["io_binding", "no_io_binding"])
def either(request, model) -> ORTLfm2ForCausalLM:
    model.use_io_binding = request.param
    return model


@pytest.fixture(scope="session")
def gold(gold_model):
    """Random prompts of the given lengths, and transformers' greedy tokens for each of them alone."""
    known: dict[tuple[str, int, int], tuple[torch.Tensor, list[int]]] = {}

    def find(length: int, name: str = "hybrid", seed: int = 1) -> tuple[torch.Tensor, list[int]]:
        key = (name, length, seed)
        if key not in known:
            (prompt,) = prompts([length], seed=seed)
            known[key] = prompt, gold_tokens(gold_model(name), prompt, NEW)
        return known[key]

    return find


def pad(rows_: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    width = max(len(row) for row in rows_)
    ids = torch.full((len(rows_), width), 9)  # not the pad token, since no result may depend on the padding's embedding
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows_):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns], mask[i, columns] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def decode(model: ORTLfm2ForCausalLM, out, mask: torch.Tensor, tokens: torch.Tensor, count: int) -> list[list[int]]:
    """Continue greedily from the cache of a `forward`, without `generate`."""
    taken = [tokens]
    while len(taken) < count:
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.int64)], dim=1)
        out = model(input_ids=taken[-1][:, None], attention_mask=mask, **{compat.CACHE: out[compat.CACHE]})
        taken.append(out.logits[:, -1].argmax(-1))
    return torch.stack(taken, dim=1).tolist()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_and_left_padding_for_every_checkpoint(name, exported, gold):
    model = ORTModelForCausalLM.from_pretrained(exported(name))
    assert isinstance(model, ORTLfm2ForCausalLM)
    rows_, golds = zip(*(gold(length, name) for length in (9, 1, 30)), strict=True)
    for row, tokens in zip(rows_, golds, strict=True):
        assert model.generate(row[None], **GREEDY)[0, len(row) :].tolist() == tokens
    assert model.generate(**pad(list(rows_), "left"), **GREEDY)[:, 30:].tolist() == list(golds)


def test_batch_is_its_rows_alone_with_and_without_io_binding(either, gold):
    rows_, golds = zip(*(gold(length) for length in (9, 1, 30, 4)), strict=True)
    assert either.generate(**pad(list(rows_), "left"), **GREEDY)[:, 30:].tolist() == list(golds)


def test_right_padding_then_decoding(either, gold):
    rows_, golds = zip(*(gold(length) for length in (9, 1, 30, 4)), strict=True)
    batch = pad(list(rows_), "right")
    out = either(**batch)
    last = batch["attention_mask"].sum(1) - 1
    first = out.logits[torch.arange(4), last].argmax(-1)
    assert decode(either, out, batch["attention_mask"], first, NEW) == list(golds)


def test_a_mask_with_holes(either, gold):
    (row, tokens), (other, other_tokens) = gold(9), gold(4)
    ids, mask = torch.full((2, 16), 9), torch.zeros(2, 16, dtype=torch.int64)
    for i, (values, columns) in enumerate([(row, [0, 1, 3, 4, 7, 8, 9, 12, 15]), (other, [2, 5, 6, 15])]):
        ids[i, columns], mask[i, columns] = values, 1
    assert either.generate(ids, attention_mask=mask, **GREEDY)[:, 16:].tolist() == [tokens, other_tokens]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_chunked_prefill(size, either, gold):
    rows_, golds = zip(*(gold(length) for length in (9, 1, 30)), strict=True)
    out = either.generate(**pad(list(rows_), "left"), prefill_chunk_size=size, **GREEDY)
    assert out[:, 30:].tolist() == list(golds)


def test_long_prompts_run_in_chunks_of_their_own(either, gold, monkeypatch):
    monkeypatch.setattr(rows, "PREFILL_CHUNK", 7)
    whole = either(input_ids=gold(30)[0][None]).logits
    rows_, golds = zip(*(gold(length) for length in (9, 1, 30)), strict=True)
    assert either.generate(**pad(list(rows_), "left"), **GREEDY)[:, 30:].tolist() == list(golds)
    for keep in (0, 1, 2, 5, 10, 31):  # the last 2 begin a chunk
        kept = either(input_ids=gold(30)[0][None], logits_to_keep=keep).logits
        torch.testing.assert_close(kept, whole[:, -keep:], atol=1e-4, rtol=0)


def test_chat_goes_on_from_the_returned_cache(either, gold, gold_model):
    turn, reply = gold(9)
    out = either.generate(turn[None], return_dict_in_generate=True, **GREEDY)
    assert isinstance(out.past_key_values, Lfm2Cache)
    assert not out.past_key_values.record.recording, "only assisted generation pays for going back"
    chat = torch.cat([out.sequences[0], prompts([11], seed=5)[0]])
    expected = gold_tokens(gold_model("hybrid"), chat, NEW)
    again = either.generate(chat[None], past_key_values=copy.deepcopy(out.past_key_values), **GREEDY)
    assert again[0, len(chat) :].tolist() == expected
    assert out.sequences[0, len(turn) :].tolist() == reply
    # Repeat from the same point: using the copy did not change the first cache.
    assert either.generate(chat[None], cache=out.past_key_values, **GREEDY)[0].tolist() == again[0].tolist()


def test_chats_of_several_rows_with_padding_in_every_turn(either, gold_model):
    """Second turns of unequal length, left-padded on a full cache. The graph cannot take them in one call."""
    first, second = prompts([9, 2, 5]), prompts([3, 12, 1], seed=3)
    golds = [gold_tokens(gold_model("hybrid"), torch.cat(pair), NEW) for pair in zip(first, second, strict=True)]
    for side in ("left", "right"):
        one, two = pad(first, side), pad(second, side)
        cache = either(**one).past_key_values
        mask = torch.cat([one["attention_mask"], two["attention_mask"]], dim=1)
        out = either(input_ids=two["input_ids"], attention_mask=mask, past_key_values=cache)
        last = two["attention_mask"].cumsum(1).argmax(1)
        first_tokens = out.logits[torch.arange(3), last].argmax(-1)
        assert decode(either, out, mask, first_tokens, NEW) == golds


def test_sampling_with_a_seed(model, gold, gold_model):
    prompt, _ = gold(9)
    settings = {**GREEDY, "do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95}
    torch.manual_seed(3)
    expected = gold_model("hybrid").generate(prompt[None], **settings)
    torch.manual_seed(3)
    assert model.generate(prompt[None], **settings).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "settings", [{"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}]
)
def test_beams(settings, either, gold, gold_model):
    prompt, _ = gold(9)
    # In transformers 4.57 its own beam search crashes with a cache.
    expected = gold_model("hybrid").generate(prompt[None], use_cache=False, **GREEDY, **settings)
    out = either.generate(prompt[None], **GREEDY, **settings, return_dict_in_generate=True)
    assert out.sequences.tolist() == expected.tolist()
    assert out[compat.CACHE].get_seq_length() == 9 + NEW - 1, "each step runs one token, on the cache"


def test_beams_of_a_prompt_that_is_shorter_than_a_convolution(either, gold_model):
    ids, settings = torch.tensor([[20]]), {**GREEDY, "num_beams": 3, "max_new_tokens": 8}
    expected = gold_model("hybrid").generate(ids, use_cache=False, **settings)
    assert either.generate(ids, **settings).tolist() == expected.tolist()


def test_beams_of_padded_rows(model, gold, gold_model):
    rows_ = [gold(length)[0] for length in (9, 1, 30)]
    golds = [gold_model("hybrid").generate(row[None], use_cache=False, num_beams=3, **GREEDY)[0] for row in rows_]
    out = model.generate(**pad(rows_, "left"), num_beams=3, **GREEDY)
    assert out[:, 30:].tolist() == [g[len(row) :].tolist() for g, row in zip(golds, rows_, strict=True)]


def test_end_of_text_stops_a_row_and_not_its_neighbour(model, gold):
    (short, tokens), (other, other_tokens) = gold(9), gold(4)
    eos = next(token for token in tokens[5:] if token not in other_tokens and token not in tokens[:5])
    out = model.generate(**pad([short, other], "left"), **{**GREEDY, "eos_token_id": eos})[:, 9:].tolist()
    end = tokens.index(eos) + 1
    assert out[0] == tokens[:end] + [0] * (NEW - end)
    assert out[1] == other_tokens


@pytest.mark.parametrize("given", ["mask", "mask that shows", "nothing"])
def test_a_batch_goes_on_where_a_row_had_ended_before_another(given, exported, gold_model):
    """The padding behind a row's end is in no state, so every row goes on as alone, also after a third turn."""
    tokenizer = AutoTokenizer.from_pretrained(exported("trained"), padding_side="left")
    model, gold = ORTModelForCausalLM.from_pretrained(exported("trained")), gold_model("trained")
    ask = "<|im_start|>user\nWhat is {}?<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer([ask.format("3 plus 4"), "Once upon a time there was a girl"], return_tensors="pt", padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    chats = [row[shown == 1] for row, shown in zip(ids, mask, strict=True)]
    settings, cache = {"do_sample": False, "max_new_tokens": 14, "return_dict_in_generate": True}, None
    for turn in range(3):
        golds = [gold.generate(chat[None], use_cache=False, **settings).sequences[0] for chat in chats]
        shows, begun = mask.clone(), inputs["input_ids"].shape[1]
        shows[:, begun : cache.get_seq_length() if cache else begun] = 1
        asked = {"mask": {"attention_mask": mask}, "mask that shows": {"attention_mask": shows}, "nothing": {}}
        out = model.generate(ids, past_key_values=copy.deepcopy(cache), **asked[given], **settings)
        answers, cache = out.sequences[:, ids.shape[1] :], out[compat.CACHE]
        chats = [torch.cat([chat, row[row != 0]]) for chat, row in zip(chats, answers, strict=True)]
        assert [chat.tolist() for chat in chats] == [one.tolist() for one in golds], turn
        assert (answers == 0).any() == (turn == 0), "only the first answer of one row ends early"
        more = tokenizer([" Then", " So"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        chats = [torch.cat(pair) for pair in zip(chats, more, strict=True)]
        ids = torch.cat([out.sequences, more], dim=1)
        mask = torch.cat([mask, (answers != 0).to(torch.int64), torch.ones_like(more)], dim=1)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.hidden.any(1).tolist() == [False, True]


def test_arguments_of_generate_by_position(model, gold):
    """As transformers' `generate` takes them: the ids, the settings, processors, stopping criteria."""
    prompt, tokens = gold(9)
    settings = GenerationConfig(**{**GREEDY, "eos_token_id": 300})  # no token; None would mean the model's own
    assert model.generate(prompt[None], settings)[0, 9:].tolist() == tokens
    short = StoppingCriteriaList([MaxLengthCriteria(max_length=12)])
    assert model.generate(prompt[None], settings, None, short)[0, 9:].tolist() == tokens[:3]


def test_stopping_criteria_and_streamers(model, gold):
    prompt, tokens = gold(9)

    class Enough(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= len(prompt) + 5])

    class Collect(BaseStreamer):
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.extend(value.reshape(-1).tolist())

        def end(self):
            self.ended = True

    streamer = Collect()
    out = model.generate(prompt[None], stopping_criteria=StoppingCriteriaList([Enough()]), streamer=streamer, **GREEDY)
    assert out[0, len(prompt) :].tolist() == tokens[:5]
    assert streamer.ended
    assert streamer.values == out[0].tolist()


def test_scores_and_logits(model, gold, gold_model):
    prompt, _ = gold(9)
    settings = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = gold_model("hybrid").generate(prompt[None], **settings)
    out = model.generate(prompt[None], **settings)
    assert len(out.logits) == NEW
    assert all(logits.dtype == torch.float32 for logits in out.logits)
    for ours, theirs in zip((*out.logits, *out.scores), (*expected.logits, *expected.scores), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_without_a_cache(model, gold):
    prompt, tokens = gold(9)
    assert model.eval().to("cpu").generate(prompt[None], use_cache=False, **GREEDY)[0, len(prompt) :].tolist() == tokens
    assert model(input_ids=prompt[None], use_cache=False).past_key_values is None
    assert len(model(input_ids=prompt[None], use_cache=False, return_dict=False)) == 1


def test_forward_with_and_without_past(either, gold, gold_model):
    prompt, _ = gold(30)
    with torch.no_grad():
        expected = gold_model("hybrid")(input_ids=prompt[None], use_cache=False).logits
    torch.testing.assert_close(either(input_ids=prompt[None]).logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(either(prompt[None], logits_to_keep=3).logits, expected[:, -3:], atol=1e-4, rtol=0)
    index = torch.tensor([2, 7])
    torch.testing.assert_close(either(prompt[None], logits_to_keep=index).logits, expected[:, index], atol=1e-4, rtol=0)
    logits, cache = either(input_ids=prompt[None, :11], return_dict=False)
    assert cache.get_seq_length() == 11
    rest = either(input_ids=prompt[None, 11:], past_key_values=cache)
    assert rest.past_key_values is cache
    torch.testing.assert_close(torch.cat([logits, rest.logits], dim=1), expected, atol=1e-4, rtol=0)


def test_io_binding_can_change_in_the_middle(model, gold):
    prompt, tokens = gold(9)
    out, mask = model(input_ids=prompt[None]), torch.ones(1, 9, dtype=torch.int64)
    taken = [out.logits[:, -1].argmax(-1)]
    for step in range(NEW - 1):
        model.use_io_binding = step % 3 != 0
        mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.int64)], dim=1)
        out = model(input_ids=taken[-1][:, None], attention_mask=mask, past_key_values=out.past_key_values)
        taken.append(out.logits[:, -1].argmax(-1))
    assert [int(token) for token in taken] == tokens


def test_a_graph_without_cache_generates(exported, gold, monkeypatch):
    monkeypatch.setattr(rows, "PREFILL_CHUNK", 7)  # without a cache no chunk could know of the one before
    model = ORTModelForCausalLM.from_pretrained(exported("hybrid", task="text-generation"))
    assert not model.can_use_cache
    rows_, golds = zip(*(gold(length) for length in (9, 1, 30)), strict=True)
    assert model.generate(**pad(list(rows_), "left"), **GREEDY)[:, 30:].tolist() == list(golds)
    with pytest.raises(Lfm2Error, match="no cache inputs"):
        model(input_ids=rows_[0][None], use_cache=True)


def test_the_trained_checkpoint_tells_stories(exported, gold_model):
    """Rows of unequal length get the words that transformers writes for each prompt alone."""
    tokenizer = AutoTokenizer.from_pretrained(exported("trained"), padding_side="left")
    texts = [
        "Once upon a time there was a girl named Nora",
        "In a house by the harbour lived",
        "Early on Friday Oscar carried a brass bell to the market.",
    ]
    golds = [
        gold_tokens(gold_model("trained"), tokenizer(text, return_tensors="pt").input_ids[0], 48) for text in texts
    ]
    model = ORTModelForCausalLM.from_pretrained(exported("trained"))
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    out = model.generate(**batch, **{**GREEDY, "max_new_tokens": 48})[:, batch.input_ids.shape[1] :]
    assert out.tolist() == golds
    assert "Nora" in tokenizer.decode(out[0])


def test_pipeline(exported, gold_model):
    generator = pipeline("text-generation", model=str(exported("trained")), accelerator="ort")
    assert isinstance(generator.model, ORTLfm2ForCausalLM)
    prompt = "Once upon a time there was a girl named"
    ids = generator.tokenizer(prompt, return_tensors="pt").input_ids[0]
    gold = torch.cat([ids, torch.tensor(gold_tokens(gold_model("trained"), ids, 12))])
    text = generator(prompt, max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert text == generator.tokenizer.decode(gold, skip_special_tokens=True)
