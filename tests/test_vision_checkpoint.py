"""The demo checkpoint that sees, exported: what it answers about pictures that it was not trained on."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from ask import answers, prompt
from drawings import drawings
from patches import patches
from pictures import gold_vl_model, gold_vl_tokens, joined
from questions import questions
from transformers import AutoTokenizer

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration


PICTURES = 100  # each with two questions
SEED = 1  # that of the training is 0
NEW = 32


@pytest.fixture(scope="module")
def tokenizer(exported):
    return AutoTokenizer.from_pretrained(exported("trained_vision"))


@pytest.mark.parametrize(("held_out", "share"), [(False, 0.9), (True, 0.85)], ids=["another seed", "held-out pairs"])
@pytest.mark.parametrize("variant", ["default", "q4"])
def test_most_answers_are_right(variant, held_out, share, exported, tokenizer):
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(exported("trained_vision", variant=variant))
    shown = islice(drawings(SEED, held_out), PICTURES)
    asked = [(picture.pixels(), *turn) for picture, rng in shown for turn in questions(rng, picture, 2)]
    said = answers(model, tokenizer, [(pixels, question) for pixels, question, _ in asked])
    right = sum(one == wanted for one, (*_, wanted) in zip(said, asked, strict=True))
    assert right >= share * len(asked)


def test_rows_of_a_batch_get_the_tokens_of_transformers(exported, checkpoint, tokenizer):
    gold_model = gold_vl_model(checkpoint("trained_vision"))
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(exported("trained_vision", variant="default"))
    shown = [picture.pixels() for picture, _ in islice(drawings(SEED), 4)]
    asked = ["Describe the picture.", "How many circles are there?", "Describe the picture.", "Where is it?"]
    tiles = [patches(pixels[None]) for pixels in shown]
    texts = [prompt(tokenizer, pixels, question) for pixels, question in zip(shown, asked, strict=True)]
    rows = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0] for text in texts]
    gold = [gold_vl_tokens(gold_model, ids, one, NEW) for ids, one in zip(rows, tiles, strict=True)]
    assert len({tuple(tokens) for tokens in gold}) == len(gold)

    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    out = model.generate(
        input_ids=ids, attention_mask=mask, **joined(tiles), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    assert out[:, longest:].tolist() == gold
