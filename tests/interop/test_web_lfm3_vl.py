"""The chat page takes pictures for LFM3-VL, and answers as transformers does from the page's ids and pixels."""

from __future__ import annotations

import base64
import json

import pytest
import torch
from clients import up_to_end
from lfm3_pictures import IMAGE, gold_lfm3_vl, make_lfm3_vl
from optimum.exporters.onnx import main_export
from pictures import drawn, gold_vl_tokens, write_png
from test_web import browse, browser, installed

from optimum_lfm2 import compat


NEW = 48


@installed
@browser
@pytest.mark.skipif("lfm3_vl" in compat.STAND_INS, reason="this transformers has no lfm3_vl")
def test_tokens_in_the_browser_are_those_of_transformers(tmp_path):
    # Full attention comes first, as in the published model: Transformers.js reads the length from the first layer.
    layers = ["conv", "full_attention", "sliding_attention", "conv", "sliding_attention"]
    source = make_lfm3_vl(tmp_path / "source", text_config={"layer_types": layers})
    settings = source / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"image_token": "<|image_pad|>"}))
    main_export(str(source), tmp_path / "export", do_validation=False)
    files = [write_png(tmp_path / f"{height}.png", drawn(height, width)) for height, width in ((16, 48), (32, 24))]
    pictures = [{"name": path.name, "base64": base64.b64encode(path.read_bytes()).decode()} for path in files]
    prompts = [
        [{"role": "user", "content": "What is it?", "pictures": pictures}],
        [{"role": "user", "content": "Tell me a story."}],
    ]
    seen = browse(tmp_path / "export", tmp_path, prompts=prompts)
    gold, golds = gold_lfm3_vl(source), []
    for given in seen["inputs"]:
        tensors = {name: torch.tensor(value["data"]).reshape(value["dims"]) for name, value in given.items()}
        pixels = {name: tensors[name] for name in ("pixel_values", "image_grid_thw") if name in tensors}
        golds.append(gold_vl_tokens(gold, tensors["input_ids"][0], pixels or None, NEW))
    assert seen["ids"] == [up_to_end(tokens) for tokens in golds]
    patches = torch.tensor(seen["inputs"][0]["image_grid_thw"]["data"]).reshape(-1, 3).prod(1).sum().item()
    assert seen["inputs"][0]["input_ids"]["data"].count(IMAGE) == patches // 4
    assert "image_grid_thw" not in seen["inputs"][1]
