"""Assisted generation writes what greedy decoding writes, and leaves the cache as its text says."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from checkpoints import CHECKPOINTS, gold_tokens, prompts
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation import CandidateGenerator

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime import assisted
from optimum_lfm2.runtime import rows as rows_module
from optimum_lfm2.runtime.lookup import PromptLookup


NEW = 40
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
LOOKUP = {"prompt_lookup_num_tokens": 10}


class Options(dict):
    """Options that `exported` can remember."""

    def __hash__(self) -> int:
        return hash(tuple(self.items()))


class Scripted(CandidateGenerator):
    """Knows the text, and is wrong with each candidate by a share."""

    def __init__(self, text: list[int], wrong: float = 0.3, most: int = 6) -> None:
        self.text, self.wrong, self.most = text, wrong, most
        self.generator = torch.Generator().manual_seed(0)

    def get_candidates(self, input_ids, **_):
        length = input_ids.shape[1]
        right = torch.tensor([self.text[length : min(length + self.most, len(self.text) - 1)]], dtype=torch.int64)
        wrong = torch.rand(right.shape, generator=self.generator) < self.wrong
        return torch.cat([input_ids, torch.where(wrong, (right + 1) % 256, right)], dim=1), None

    def update_candidate_strategy(self, *_):
        pass


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """A model of torch for drafts: most of them are wrong."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, eos_token_id=7)
    return LlamaForCausalLM(config).eval()


def counted(model, monkeypatch) -> list[int]:
    """The number of tokens of each call of the graph from here on."""
    calls: list[int] = []
    run = model._graph.run
    monkeypatch.setattr(model._graph, "run", lambda ids, *args: (calls.append(ids.shape[1]), run(ids, *args))[1])
    return calls


@pytest.mark.parametrize("name", ["hybrid", *(["lfm3"] if "lfm3" in CHECKPOINTS else [])])
@pytest.mark.parametrize("way", ["columns", "replay", "copies"])
def test_a_chat_of_candidates_right_and_wrong(way, name, exported, gold_model, monkeypatch):
    """A prompt of several chunks with padding before it and a hole; the next turn goes on from the cache."""
    monkeypatch.setattr(rows_module, "PREFILL_CHUNK", 7)
    options = {"model_kwargs": Options(rollback="columns")} if way == "columns" else {}
    model = ORTModelForCausalLM.from_pretrained(exported(name, **options), use_io_binding=way != "copies")
    ids, mask = torch.full((1, 36), 9), torch.zeros(1, 36, dtype=torch.int64)
    shown = [*range(3, 20), *range(22, 36)]
    mask[0, shown] = 1
    ids[0, shown] = prompts([31])[0]
    gold = gold_tokens(gold_model(name), ids[0, shown], NEW)
    chat = [*ids[0].tolist(), *gold, *prompts([11], seed=5)[0].tolist()]
    seen = torch.tensor([*ids[0, shown].tolist(), *chat[36:]])
    after = gold_tokens(gold_model(name), seen, NEW)

    settings = {**GREEDY, **LOOKUP, "return_dict_in_generate": True}
    monkeypatch.setattr(model, "_get_candidate_generator", lambda *_, **__: Scripted([*chat[:76], 0]))
    first = model.generate(ids, attention_mask=mask, **settings)
    assert first.sequences[0, 36:].tolist() == gold
    cache = first[compat.CACHE]
    assert cache.get_seq_length() == 75
    assert not cache.record.recording

    turn = torch.tensor([chat])
    whole = torch.cat([mask, torch.ones(1, len(chat) - 36, dtype=torch.int64)], dim=1)
    plain = model.generate(turn, attention_mask=whole, past_key_values=copy.deepcopy(cache), **GREEDY)
    assert plain[0, len(chat) :].tolist() == after
    monkeypatch.setattr(model, "_get_candidate_generator", lambda *_, **__: Scripted([*chat, *after, 0], most=3))
    calls = counted(model, monkeypatch)
    second = model.generate(turn, attention_mask=whole, past_key_values=cache, **settings).sequences
    assert second[0, len(chat) :].tolist() == after
    assert len(calls) < 0.8 * NEW


@pytest.mark.parametrize("drafter", ["right", "wrong", "torch"])
def test_a_drafting_model(drafter, exported, gold_model, llama, monkeypatch):
    """Ours that is always right or mostly wrong, and one of torch; then the end of the text among its drafts."""
    model = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
    folders = {
        "right": exported("hybrid", model_kwargs=Options(rollback="columns")),
        "wrong": exported("conv_width_2"),
    }
    assistant = ORTModelForCausalLM.from_pretrained(folders[drafter]) if drafter in folders else llama
    (prompt,) = prompts([30])
    gold = gold_tokens(gold_model("hybrid"), prompt, NEW)
    calls = counted(model, monkeypatch)
    out = model.generate(prompt[None], assistant_model=assistant, return_dict_in_generate=True, **GREEDY)
    assert out.sequences[0, 30:].tolist() == gold
    assert out[compat.CACHE].get_seq_length() == 29 + NEW
    assert (len(calls) < 0.6 * NEW) == (drafter == "right")
    end = next(i for i in range(6, NEW) if gold[i] not in gold[:i] and i % 2)
    for settings in ({"eos_token_id": gold[end]}, {"max_new_tokens": end + 1}):
        ended = model.generate(prompt[None], assistant_model=assistant, **{**GREEDY, **settings})
        assert ended[0, 30:].tolist() == gold[: end + 1]


class TestPromptLookup:
    @pytest.fixture(scope="class")
    def model(self, exported):
        return ORTModelForCausalLM.from_pretrained(exported("trained"))

    @pytest.fixture(scope="class")
    def chat(self, exported) -> torch.Tensor:
        """One whose answers repeat words of it."""
        tokenizer = AutoTokenizer.from_pretrained(exported("trained"))
        said = [
            {"role": "user", "content": "Ben put the silver key next to the well. Where is the silver key?"},
            {"role": "assistant", "content": "The silver key is next to the well."},
            {"role": "user", "content": "Ben put the silver key next to the well. Where is the silver key?"},
        ]
        return tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]

    def test_tokens_ends_and_criteria(self, model, chat, monkeypatch):
        """Of the trained checkpoint: it goes on after the end of its turn, and repeats itself."""
        settings = {**GREEDY, "max_new_tokens": 80}
        plain = model.generate(chat, **settings)[0].tolist()
        calls = counted(model, monkeypatch)
        out = model.generate(chat, **settings, **LOOKUP, return_dict_in_generate=True, output_scores=True)
        assert out.sequences[0].tolist() == plain
        assert len(out.scores) == 80
        assert len(calls) < 60
        assert max(calls[1:]) > 4
        prompt = chat.shape[1]
        for end in (3, 8, 13, 31):  # wherever it falls among candidates
            token = plain[prompt + end]
            text = plain[: plain.index(token, prompt) + 1]
            assert model.generate(chat, **{**settings, "eos_token_id": token}, **LOOKUP)[0].tolist() == text
            short = model.generate(chat, **{**settings, "max_new_tokens": end}, **LOOKUP)
            assert short[0].tolist() == plain[: prompt + end]

            class Enough(StoppingCriteria):
                def __call__(self, input_ids, scores, text=text, **kwargs):
                    return torch.tensor([input_ids[0, -1] == text[-1] and input_ids.shape[1] > prompt])

            criteria = StoppingCriteriaList([Enough()])
            assert model.generate(chat, stopping_criteria=criteria, **settings, **LOOKUP)[0].tolist() == text

    @pytest.mark.parametrize("sizes", [None, 1, 4])
    @pytest.mark.parametrize("rollback", ["columns", "replay"])
    def test_what_it_is_told(self, rollback, sizes, exported, monkeypatch):
        told: list[tuple] = []

        class Told(PromptLookup):
            def __init__(self, most, sizes, longest, **options):
                told.append((most, sizes, longest, options))
                super().__init__(most, sizes, longest, **options)

        monkeypatch.setattr(assisted, "PromptLookup", Told)
        options = {"model_kwargs": Options(rollback="columns")} if rollback == "columns" else {}
        model = ORTModelForCausalLM.from_pretrained(exported("hybrid", **options))
        settings = {**GREEDY, "max_new_tokens": 5, "prompt_lookup_num_tokens": 1, "max_matching_ngram_size": sizes}
        cache = model._graph.new_cache(1)
        cache.activate_past_recording()
        model.generate(torch.tensor([[9, 8, 9]]), past_key_values=cache, **settings | {"eos_token_id": [300, 7]})
        (most, sizes_, longest, options) = told[0]
        assert (most, sizes_, longest) == (1, sizes or 2, 8)
        assert (sorted(options["ends"]), options["stops"]) == ([7, 300], None)
        assert options["replays"] == (rollback == "replay")
        assert cache.record.recording, "it recorded before, too"
        cache.record.pending = torch.tensor([[9, 9]])
        assert options["pending"]() == 2
        model.generate(torch.full((1, 510), 9), **settings | {"max_new_tokens": 20})
        assert told[1][2] == 512, "no candidate goes beyond the model's positions"

    def test_padding_on_the_right(self, model, chat):
        expected = model.generate(chat, **GREEDY)[0, chat.shape[1] :].tolist()
        ids = torch.cat([chat, torch.full((1, 2), 9)], dim=1)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        assert model.generate(ids, attention_mask=mask, **GREEDY, **LOOKUP)[0, ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("draft", ["model", "lookup"])
def test_samples_are_distributed_as_the_model_says(draft, exported, gold_model, llama, monkeypatch):
    """Two tokens of the three likeliest each: nine texts, counted. The chi-square is exceeded once in a thousand."""
    model = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
    (prompt,) = prompts([9])
    with torch.no_grad():
        texts: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(2):
            for text, p in list(texts.items()):
                del texts[text]
                logits = gold_model("hybrid")(
                    input_ids=torch.cat([prompt, torch.tensor(text, dtype=torch.int64)])[None]
                )
                top = (logits.logits[0, -1] / 3).topk(3)
                for share, token in zip(top.values.softmax(-1).tolist(), top.indices.tolist(), strict=True):
                    texts[(*text, token)] = p * share
    likely = max(texts, key=texts.get)
    if draft == "lookup":
        monkeypatch.setattr(
            model, "_get_candidate_generator", lambda *_, **__: Scripted([*prompt.tolist(), *likely, 0], wrong=0)
        )
    way = LOOKUP if draft == "lookup" else {"assistant_model": llama}
    settings = {"do_sample": True, "temperature": 3.0, "top_k": 3, "max_new_tokens": 2, "eos_token_id": None}
    torch.manual_seed(0)
    count = 300
    drawn = collections.Counter(
        tuple(model.generate(prompt[None], **settings, pad_token_id=0, **way)[0, 9:].tolist()) for _ in range(count)
    )
    assert not drawn.keys() - texts.keys()
    assert sum((drawn[text] - count * p) ** 2 / (count * p) for text, p in texts.items()) < 26.1


class TestRefusals:
    @pytest.fixture(scope="class")
    def model(self, exported):
        return ORTModelForCausalLM.from_pretrained(exported("hybrid"))

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"assistant_early_exit": 2}, "assistant_early_exit cannot be honoured"),
            ({"prompt_lookup_num_tokens": 3, "use_cache": False}, "needs a cache"),
            ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens is 0"),
            ({"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": -1}, "max_matching_ngram_size -1"),
        ],
    )
    def test_settings(self, settings, says, model):
        with pytest.raises(Lfm2Error, match=says) as error:
            model.generate(torch.tensor([[9, 8, 7]]), **GREEDY, **settings)
        assert "\n" not in str(error.value)

    def test_several_rows_as_transformers_does(self, model):
        with pytest.raises(ValueError, match="only supported for batch_size = 1"):
            model.generate(torch.tensor([[9, 8], [7, 9]]), **GREEDY, **LOOKUP)

    def test_new_tokens_alone(self, model):
        cache = model(torch.tensor([[9, 8, 7]])).past_key_values
        mask = torch.ones(1, 5, dtype=torch.int64)
        with pytest.raises(Lfm2Error, match="takes all tokens of a chat"):
            model.generate(torch.tensor([[9, 8]]), attention_mask=mask, past_key_values=cache, **GREEDY, **LOOKUP)

    def test_padding_on_the_right_with_a_drafting_model(self, model, llama):
        mask = torch.tensor([[1, 1, 0]])
        with pytest.raises(Lfm2Error, match="no padding on the right"):
            model.generate(torch.tensor([[9, 8, 7]]), attention_mask=mask, assistant_model=llama, **GREEDY)
