"""Pictures in `optimum-cli lfm2 chat` and `serve`, with transformers' own processor, against transformers alone."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision_python
from drawings import draw
from patches import patches
from pictures import gold_vl_model, gold_vl_tokens, write_png
from transformers import AutoTokenizer

from optimum_lfm2.compat import TRANSFORMERS_5


pytestmark = pytest.mark.skipif(not torchvision_python.is_installed(), reason="no torchvision")

SERVES = TRANSFORMERS_5 and all(importlib.util.find_spec(name) for name in ("fastapi", "openai"))
SUPPORT = Path(__file__).parents[1] / "support"
ROOT = SUPPORT.parents[1]
QUESTION, NEW = "Describe the picture.", 32


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> tuple[Path, list]:
    """A folder with two pictures, and their pixels."""
    folder = tmp_path_factory.mktemp("shown")
    pixels = [draw(random.Random(seed), (128, 96)).pixels() for seed in (0, 5)]
    for i, one in enumerate(pixels):
        write_png(folder / f"{i}.png", one)
    return folder, pixels


@pytest.fixture(scope="module")
def golds(exported, checkpoint, shown) -> list[str]:
    """What transformers says of the first picture, and then of the second, reading the whole chat."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(exported("trained_vision")),
        gold_vl_model(checkpoint("trained_vision")),
    )
    golds, text, tiles = [], tokenizer.bos_token, []
    for pixels in shown[1]:
        tiles.append(patches(pixels[None]))
        picture = f"{tokenizer.image_start_token}{tokenizer.image_token * 12}{tokenizer.image_end_token}"
        text += f"<|im_start|>user\n{picture}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        all_tiles = {name: torch.cat([one[name] for one in tiles]) for name in tiles[0]}
        with torch.no_grad():
            tokens = gold_vl_tokens(model, ids, all_tiles, NEW)
        golds.append(tokenizer.decode(tokens[: tokens.index(tokenizer.eos_token_id)]))
        text += f"{golds[-1]}<|im_end|>\n"
    assert golds[0] != golds[1]
    return golds


@pytest.fixture(scope="module")
def said(exported, shown) -> dict:
    """What the chat and the server say, in a process that has torchvision."""
    folder, _ = shown
    (folder / "broken.png").write_bytes(b"none")
    child = [SUPPORT / "torchvision_python.py", SUPPORT / "picture_chats_child.py", exported("trained_vision")]
    command = [sys.executable, *map(str, child), QUESTION, str(NEW), *(["serve"] if SERVES else [])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, SUPPORT))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "said.json").read_text())


def test_chat(said, shown, golds):
    """Two turns about two pictures. The second reads its own tokens and picture alone, and transformers reads all."""
    assert "broken.png is no picture that can be read" in said["chat"]["err"]
    assert said["chat"]["err"].count("\n") == 1
    assert said["chat"]["out"].splitlines() == golds
    saved = json.loads((shown[0] / "chat.json").read_text())
    assert saved[2]["content"][0] == {"type": "image", "path": "1.png"}


@pytest.mark.skipif(not SERVES, reason="the server is transformers 5.24's, and needs fastapi and openai")
def test_serve(said, golds):
    """Pictures come as data. Requests at once do not mix them, and one that was read is not read again."""
    first, second = golds
    assert said["alone"] == said["streamed"] == said["responses"] == first
    assert said["second turn"] == second
    assert said["together"] == said["apart"]
    assert len(set(said["apart"])) == 2
    assert said["features made"] == {"a picture": 1, "the next turn": 0, "another": 1}
    assert "cannot be read" in said["broken"]
    assert "\n" not in said["broken"]
