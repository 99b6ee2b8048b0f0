"""One row with pictures, without padding: every way to go on from a cache, also from one that was cropped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pictures import IMAGE, gold_vl_model, joined, pictures, row
from turns import COPIES, MASKS, NEW, SETTINGS, Expected, Turn

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration, compat
from optimum_lfm2.errors import Lfm2Error


FIRST = ("Tell me about this: #", [[(2, 3)]])
SECONDS = [("What is 3 plus 4?", []), ("And this? #", [[(2, 2), (1, 3)]])]


@pytest.fixture(scope="module")
def model(vl_folder):
    return ORTLfm2VlForConditionalGeneration.from_pretrained(vl_folder)


@pytest.fixture(scope="module")
def gold(vl_checkpoint):
    return gold_vl_model(vl_checkpoint)


@torch.no_grad()
def expected(gold: Any, ids: torch.Tensor, features: torch.Tensor) -> Expected:
    """What transformers writes after one row, without a cache: the i-th picture token is the i-th feature."""
    embed = gold.get_input_embeddings()
    embeds = embed(ids)[None]
    embeds[0, ids == IMAGE] = features
    tokens: list[int] = []
    logits = []
    for _ in range(NEW):
        logits.append(gold.lm_head(gold.model.language_model(inputs_embeds=embeds, use_cache=False)[0][0, -1]))
        tokens.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, embed(torch.tensor([[tokens[-1]]]))], dim=1)
    return Expected(tokens, torch.stack(logits))


def shown(tiles: list, config: Any, seed: int) -> dict[str, torch.Tensor]:
    """The pictures of a turn, as the processor gives them."""
    return pictures([tile for picture in tiles for tile in picture], config, seed) if tiles else {}


def ways(
    model: Any, chat: torch.Tensor, after: Expected, make: Callable[[], Any], given: dict[str, dict], name: str
) -> Iterator[Turn]:
    """Go on by all ids or the new ones, with the pictures that `given` has for each of these."""
    for part, (named, mask), size in itertools.product(given, list(MASKS.items())[:2], (None, 3)):
        alone = part.startswith("new ids")
        if alone and named == "no mask":
            continue

        def run(part=part, mask=mask, size=size, alone=alone) -> Any:
            cache = make()
            ids = chat[cache.get_seq_length() if cache is not None and alone else 0 :]
            options = {**SETTINGS, "prefill_chunk_size": size, compat.CACHE: cache}
            return model.generate(ids[None], attention_mask=mask(len(chat)), **options, **given[part])

        yield Turn(f"{name}, {part}, {named}, chunks of {size}", run, after)


def cases(model: Any, gold: Any) -> Iterator[Turn]:
    text, tiles = FIRST
    first, a = row(text, tiles), shown(tiles, gold.config, 1)
    features = compat.picture_features(gold, a)
    answer = expected(gold, first, features)
    yield from ways(model, first, answer, lambda: None, {"all ids": a}, "first turn")
    seen = torch.cat([first, torch.tensor(answer.tokens[:-1])])
    cache = model.generate(first[None], **SETTINGS, **a)[compat.CACHE]
    start = int((first == IMAGE).nonzero()[0])

    def cropped(back: int) -> Callable[[], Any]:
        def make() -> Any:
            own = model._graph.new_cache(1)
            own.activate_past_recording()
            model.generate(first[None], **SETTINGS, **a, **{compat.CACHE: own})
            own.crop(-back)
            return own

        return make

    for i, (text, tiles) in enumerate(SECONDS):
        second, b = row(text, tiles), shown(tiles, gold.config, 5)
        new = compat.picture_features(gold, b) if b else features[:0]
        both = {"all ids, all pictures": joined([a, b]) if b else a, "all ids, new pictures": b, "new ids": b}
        chat = torch.cat([seen, torch.tensor(answer.tokens[-1:]), second])
        after = expected(gold, chat, torch.cat([features, new]))
        for named, copied in COPIES.items():
            yield from ways(model, chat, after, lambda copied=copied: copied(cache), both, f"{named}, turn {i}")
        # Into the answer, behind the picture, within it, and before it.
        for back in (2, len(seen) - start - 6, len(seen) - start - 4, len(seen) - start - 1, len(seen) - start + 2):
            kept = seen[:-back]
            count = int((kept == IMAGE).sum())
            chat = torch.cat([kept, second])
            after = expected(gold, chat, torch.cat([features[:count], new]))
            given = both if count == 6 else {"all ids, new pictures": b, "new ids": b}
            for named, copied in {"itself": lambda own: own, **(COPIES if 0 < count < 6 else {})}.items():
                make = lambda copied=copied, back=back: copied(cropped(back)())  # noqa: E731
                yield from ways(model, chat, after, make, given, f"crop({-back}) at {count}, {named}, turn {i}")
            if i == 0:  # the same text again, whose picture is cut
                yield from ways(model, first, answer, cropped(max(back, NEW)), {"all ids": a}, f"again from {-back}")


def test_every_way_to_go_on(model, gold, record_property):
    drawn = list(cases(model, gold))
    record_property("cases", len(drawn))
    assert len(drawn) > 150
    faults = [fault for turn in drawn if (fault := turn.fault()) is not None]
    assert not faults, "\n".join([f"{len(faults)} of {len(drawn)}", *faults[:8]])


def test_features_are_dropped_when_nothing_goes_back(model, gold):
    text, tiles = FIRST
    first, a = row(text, tiles), shown(tiles, gold.config, 1)
    cache = model._graph.new_cache(1)
    model(first[None], cache=cache, **a)
    model(torch.tensor([[9]]), cache=cache)
    assert cache.record.features is None
    cache.activate_past_recording()
    for count in (6, 12):
        model(first[None], cache=cache, **a)
        assert len(cache.record.features) == count
    cache.stop_recording()
    model(torch.tensor([[9]]), cache=cache)
    assert cache.record.features is None


def test_ids_that_lost_their_features(model, gold):
    text, tiles = FIRST
    first = row(text, tiles)
    cache = model._graph.new_cache(1)
    cache.activate_past_recording()
    model(first[None], cache=cache, **shown(tiles, gold.config, 1))
    cache.crop(-3)
    cache.record.features = None
    with pytest.raises(Lfm2Error, match="lost the features"):
        model(torch.tensor([[9]]), cache=cache)


def test_pictures_of_a_cut_turn_that_do_not_fit(model, gold):
    """With the pictures of the whole chat, nothing says which of their tokens were cut out."""
    text, tiles = FIRST
    first, a = row(text, tiles), shown(tiles, gold.config, 1)
    cache = model._graph.new_cache(1)
    cache.activate_past_recording()
    model(first[None], cache=cache, **a)
    start = int((first == IMAGE).nonzero()[0])
    cache.crop(start + 2 - len(first))
    chat = torch.cat([first[: start + 2], row("And this? #", [[(1, 2)]])])
    both = joined([a, shown([[(1, 2)]], gold.config, 5)])
    with pytest.raises(Lfm2Error, match="picture tokens, and the pictures fill 8"):
        model.generate(chat[None], cache=cache, max_new_tokens=2, **both)
