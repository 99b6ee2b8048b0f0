"""Requests with pictures and videos in the server's manager: the tokens of transformers, in shared calls."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from make_exports import EXPORTS, PICTURES
from pictures import TRAINED
from transformers import AutoTokenizer, GenerationConfig

from optimum_lfm2 import ORTLfm3VlForConditionalGeneration, compat
from optimum_lfm2.runtime.scheduler import Limits


if not compat.TRANSFORMERS_5:
    pytest.skip("transformers 4 has no server", allow_module_level=True)
pytest.importorskip("fastapi")

from optimum_lfm2.serving.manager import SharedManager


@pytest.fixture
def manager():
    model = ORTLfm3VlForConditionalGeneration.from_pretrained(EXPORTS / PICTURES)
    running = SharedManager(model, AutoTokenizer.from_pretrained(TRAINED), Limits())
    yield running
    running.stop()


def answers(manager: SharedManager, *requests: dict) -> list:
    """What the manager gives for requests that come at the same time: tokens, or the error."""
    new = len(json.loads((EXPORTS / PICTURES / "gold.json").read_text())["tokens"])
    settings = {"max_new_tokens": new, "do_sample": False}

    async def run() -> list:
        calls = [
            manager.generate_non_streaming(manager._model, None, given, GenerationConfig(**settings), str(i))
            for i, given in enumerate(requests)
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    return [str(one) if isinstance(one, Exception) else one[2] for one in asyncio.run(run())]


def test_requests_share_calls_and_get_their_own_tokens(manager):
    """Beside another video with the same prompt, and again from the prefix that is kept."""
    gold = json.loads((EXPORTS / PICTURES / "gold.json").read_text())
    given = torch.load(EXPORTS / PICTURES / "pictures.pt")
    asked = {"input_ids": torch.tensor([gold["prompt"]]), **given}
    other = asked | {"pixel_values_videos": given["pixel_values_videos"].flip(0)}
    text = {"input_ids": torch.tensor([[1, 6, 95, 9]])}
    first = answers(manager, asked, other, text, asked)
    assert 7 not in gold["tokens"]  # the model's own end
    assert first[0] == first[3] == gold["tokens"] != first[1]
    assert answers(manager, asked, other) == first[:2]
    missing = {name: values for name, values in asked.items() if name != "video_grid_thw"}
    assert "video_grid_thw is missing" in answers(manager, missing)[0]
    few = asked | {"input_ids": asked["input_ids"][:, :-4]}
    assert "has 2 video tokens, and the videos fill 4" in answers(manager, few)[0]
