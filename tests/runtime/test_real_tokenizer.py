"""A chat with tools, by a tokenizer of the real one's shape: fewer tokens than the model has rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import gold_tokens, make_checkpoint
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from real_tokenizer import ROWS, TOKENS, called, tool, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_lfm2 import compat


pytestmark = pytest.mark.once  # it takes seconds for a vocabulary of this size, and other tests compare the releases
NEW = 12
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
TOOLS = [tool("get_weather", "city", "day"), tool("größe_von", "wort")]
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it raining in Zürich? 🌧"}]
ANSWERED = [
    {"role": "assistant", "content": called("get_weather", city="Zürich", day="today")},
    {"role": "tool", "content": {"rain": True, "mm": 3.5}},
]


@pytest.fixture(scope="module")
def folders(made_once) -> dict[str, Path]:
    def make(folder: Path) -> None:
        source = write_tokenizer(make_checkpoint("hybrid", folder, vocab_size=ROWS))
        main_export(str(source), folder / "export", do_validation=False)

    folder = made_once("real-tokenizer", make)
    return {"checkpoint": folder / "hybrid", "export": folder / "export"}


@pytest.fixture(scope="module")
def tokenizer(folders):
    return AutoTokenizer.from_pretrained(folders["export"])


def asked(tokenizer, chat: list[dict]) -> dict[str, torch.Tensor]:
    return dict(
        tokenizer.apply_chat_template(
            chat, tools=TOOLS, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    )


def test_the_export_has_the_tokenizer_of_the_checkpoint(folders, tokenizer):
    theirs = AutoTokenizer.from_pretrained(folders["checkpoint"])
    assert len(theirs) == len(tokenizer) == TOKENS
    for chat in (ASKED, ASKED + ANSWERED):
        ids = asked(tokenizer, chat)["input_ids"]
        assert torch.equal(ids, asked(theirs, chat)["input_ids"])
        text = tokenizer.decode(ids[0])
        assert text.startswith("<|startoftext|><|im_start|>system\nBe brief.\nList of tools: <|tool_list_start|>[{")
        assert "größe_von" in text
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_turns_with_tools_are_those_of_transformers(folders, tokenizer):
    """The template writes the whole chat anew, so the second turn follows the call that the caller put in."""
    gold, model = (
        load.from_pretrained(folders[name])
        for load, name in ((AutoModelForCausalLM, "checkpoint"), (ORTModelForCausalLM, "export"))
    )
    first, second = (asked(tokenizer, chat) for chat in (ASKED, ASKED + ANSWERED))
    golds = [gold_tokens(gold, turn["input_ids"][0], NEW) for turn in (first, second)]
    prompt = first["input_ids"].shape[1]
    cache = model._graph.new_cache(1)
    cache.activate_past_recording()
    out = model.generate(**first, **GREEDY, **{compat.CACHE: cache})
    assert out[0, prompt:].tolist() == golds[0]
    assert isinstance(tokenizer.decode(out[0]), str), "rows without a token are nothing"
    cache.crop(prompt - cache.get_seq_length())
    assert torch.equal(second["input_ids"][:, :prompt], first["input_ids"])
    for size, lookup in ((None, None), (7, None), (None, 4)):
        twin = model._graph.new_cache(1)
        model(first["input_ids"][:, :-1], **{compat.CACHE: twin})
        options = {**GREEDY, "prefill_chunk_size": size, "prompt_lookup_num_tokens": lookup, compat.CACHE: twin}
        out = model.generate(**second, **options)
        assert out[0, second["input_ids"].shape[1] :].tolist() == golds[1]
    new = second["input_ids"][:, prompt:]
    out = model.generate(new, attention_mask=second["attention_mask"], **GREEDY, **{compat.CACHE: cache})
    assert out[0, new.shape[1] :].tolist() == golds[1]


def test_rows_without_a_token(folders, tokenizer):
    """They are the model's as all others: it may write them, and reads them again."""
    model = ORTModelForCausalLM.from_pretrained(folders["export"])
    bias = {(TOKENS + 5,): 1e4}
    prompt = tokenizer("Hello", return_tensors="pt")["input_ids"]
    out = model.generate(prompt, **{**GREEDY, "max_new_tokens": 3}, sequence_bias=bias)
    assert out[0, prompt.shape[1] :].tolist() == [TOKENS + 5] * 3
    assert tokenizer.decode(out[0]) == "Hello"
    assert model(torch.tensor([[ROWS - 1]])).logits.shape[-1] == ROWS
    with pytest.raises(ValueError, match="outside the vocabulary of 65536"):
        model(torch.tensor([[ROWS]]))
