"""Fixtures for the tests with other clients: exports in a plain onnxruntime loop, and the gold."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from clients import NEW, PROMPTS, PlainModel
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def plain():
    """`plain(path, exact=False)` gives the `PlainModel` of a file."""
    return cache(PlainModel)


@pytest.fixture(scope="session")
def gold_continuation(gold_model):
    """`gold_continuation(ids, count)` gives transformers' greedy tokens after one unpadded row, run alone.

    It does not stop at an end-of-turn token.
    """
    model = gold_model("trained").float()

    @torch.no_grad()
    def gold_continuation(ids: list[int], count: int) -> list[int]:
        inputs = torch.tensor([ids])
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[0, len(ids) :].tolist()

    return gold_continuation


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint("trained"))


@pytest.fixture(scope="session")
def prompt_ids(tokenizer):
    texts = [
        p if isinstance(p, str) else tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False)
        for p in PROMPTS
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.fixture(scope="session")
def long_ids(prompt_ids, gold_continuation):
    """A longer text on which logits are compared."""
    story = gold_continuation(prompt_ids[2], NEW)
    assert len(set(story)) > NEW // 3, "a gold that repeats itself proves nothing"
    return prompt_ids[2] + story
