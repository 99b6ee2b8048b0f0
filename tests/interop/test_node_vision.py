"""Transformers.js in node runs an exported LFM2-VL and gives the tokens of transformers, from the same pixel values."""

from __future__ import annotations

import json
import shutil

import pytest
from clients import case
from pictures import gold_vl_model, gold_vl_tokens, pictures, row
from test_node import INSTALLED, ask


pytestmark = [
    pytest.mark.skipif(not shutil.which("node"), reason="no node on the PATH"),
    pytest.mark.skipif(not INSTALLED, reason="no node_modules: run `npm ci --ignore-scripts` in examples/web"),
]

NEW = 32
# The text of a prompt, and the tiles of its pictures.
PROMPTS = [
    ("Tell me about this: #", [[(2, 3)]]),
    ("# Ben put the silver key next to the well. Where is the silver key? #", [[(1, 1)], [(3, 2), (1, 2)]]),
]


def test_tokens_are_transformers(vl_folder, vl_checkpoint, tmp_path):
    model = gold_vl_model(vl_checkpoint)
    cases, gold = {}, {}
    for i, (text, tiles) in enumerate(PROMPTS):
        shown = pictures([tile for picture in tiles for tile in picture], model.config, seed=i)
        ids = row(text, tiles)
        values = {
            name: {
                "type": "float32" if name == "pixel_values" else "int64",
                "data": x.flatten().tolist(),
                "dims": list(x.shape),
            }
            for name, x in shown.items()
        }
        cases[i] = case("pictures", dtype="fp32", ids=ids.tolist(), values=values, max_new_tokens=NEW)
        gold[i] = gold_vl_tokens(model, ids, shown, NEW)
    folder = shutil.copytree(vl_folder, tmp_path / "vl")
    # The library stops at this token, and the gold does not.
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": None}))
    assert ask(folder, cases) == gold
