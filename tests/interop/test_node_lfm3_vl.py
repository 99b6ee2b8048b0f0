"""Transformers.js in node runs LFM3-VL, and gives the tokens of transformers from the same pixel values."""

from __future__ import annotations

import json
import shutil

import numpy as np
import torch
from clients import case
from lfm3_pictures import TRAINED
from make_exports import EXPORTS, PICTURES
from node import NEEDS_NODE
from pictures import drawn, write_png
from test_node import ask

from optimum_lfm2.graph.lfm3_vision import PROCESSOR


pytestmark = NEEDS_NODE


def test_tokens_are_transformers(tmp_path):
    """Two pictures of different sizes in one call, also through its own processor. It takes no videos (4.3.2)."""
    folder = shutil.copytree(EXPORTS / PICTURES, tmp_path / "vl")
    for path in TRAINED.glob("*token*.json"):
        shutil.copy(path, folder)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": None}))
    ids, gold = json.loads((folder / "gold.json").read_text())["of pictures"]
    given = torch.load(folder / "pictures.pt")
    values = {
        name: {
            "type": "float32" if name == "pixel_values" else "int64",
            "data": given[name].flatten().tolist(),
            "dims": list(given[name].shape),
        }
        for name in ("pixel_values", "image_grid_thw")
    }
    asked = case("pictures", dtype="fp32", ids=ids, values=values, max_new_tokens=len(gold))
    drawings = [drawn(24, 32), drawn(16, 24)]
    paths = [str(write_png(tmp_path / f"{i}.png", pixels)) for i, pixels in enumerate(drawings)]
    answers = ask(folder, {"tokens": asked, "grids": case("grids", paths=paths)})
    assert answers["tokens"] == gold
    assert answers["grids"]["shapes"] == [[1, 6, 8], [1, 4, 6]]
    # A patch is (channels, frames, rows, columns), and both frames are the picture. Blocks of 2 x 2 lie together.
    patches = np.array(answers["grids"]["values"]).reshape(6 * 8 + 4 * 6, 3, 2, 4, 4)
    mean, deviation = (np.array(PROCESSOR.defaults[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    right_below = drawings[0][4:8, 4:8].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(patches[3, :, 0], (right_below - mean) / deviation, atol=1e-5)
    np.testing.assert_array_equal(patches[:, :, 0], patches[:, :, 1])
