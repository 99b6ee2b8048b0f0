"""A tiny LFM3-VL checkpoint, pictures and videos for it, and the gold: transformers on one unpadded row at a time.

Weights are random, and such that greedy text varies. Pictures are pixels of random values, as the processor would give
them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from checkpoints import BASE, LFM3, vary
from pictures import CHAT_TEMPLATE, TRAINED
from transformers import AutoModelForImageTextToText, AutoTokenizer, PretrainedConfig, PreTrainedModel

from optimum_lfm2.compat import picture_features


IMAGE, VIDEO = 4, 5
# Special tokens of the trained tokenizer that its texts do not use, and what they are in a processor of LFM3-VL.
RENAMED = {
    "<|endoftext|>": "<|vision_start|>",
    "<|fim_pre|>": "<|vision_end|>",
    "<|fim_mid|>": "<|image_pad|>",
    "<|fim_suf|>": "<|video_pad|>",
}
TEMPLATE = CHAT_TEMPLATE.replace(
    "<image>", "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'video' %}<|video_pad|>"
)
VISION = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "patch_size": 4,
}
SETTINGS = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "resample": 3}
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Lfm3VlProcessor",
    "size": {"shortest_edge": 256, "longest_edge": 4096},
    **SETTINGS,
}
VIDEO_PROCESSOR = {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "processor_class": "Lfm3VlProcessor",
    "size": {"shortest_edge": 512, "longest_edge": 8192},
    **SETTINGS,
}


@torch.no_grad()
def make_lfm3_vl(folder: Path, **changes: object) -> Path:
    """Save a checkpoint to `folder`, with a tokenizer and processors. `changes` are options of `Lfm3VlConfig`."""
    from transformers import Lfm3VlConfig, Lfm3VlForConditionalGeneration  # of transformers 5.23

    text = {**BASE, **LFM3, "vocab_size": 2048, "max_position_embeddings": 1024} | changes.pop("text_config", {})
    text.pop("block_multiple_of")
    vision = VISION | changes.pop("vision_config", {})
    options = {"image_token_id": IMAGE, "video_token_id": VIDEO, "projector_hidden_size": 40, **changes}
    config = Lfm3VlConfig(text_config=text, vision_config=vision, **options)
    torch.manual_seed(1)
    model = Lfm3VlForConditionalGeneration(config).eval()
    vary(model)
    for name, parameter in model.named_parameters():
        if name.endswith((".q_norm.weight", ".k_norm.weight")):
            parameter.mul_(2)  # or attention sees everything alike
    features = picture_features(model.model, shown([(1, 6, 6), (1, 12, 6)], config))
    scale = model.get_input_embeddings().weight.norm(dim=1).mean() / features.norm(dim=1).mean()
    for parameter in model.model.multi_modal_projector.linear_2.parameters():
        parameter.mul_(scale)
    model.save_pretrained(folder)
    for path in TRAINED.glob("*token*.json"):
        written = path.read_text(encoding="utf-8")
        for old, new in RENAMED.items():
            written = written.replace(old, new)
        (folder / path.name).write_text(written, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    own = config.vision_config
    sizes = {"patch_size": own.patch_size, "merge_size": own.spatial_merge_size}
    sizes["temporal_patch_size"] = own.temporal_patch_size
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | sizes))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_PROCESSOR | sizes))
    return folder


def gold_lfm3_vl(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def shown(grids: Sequence[tuple[int, int, int]], config: PretrainedConfig, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return pictures as the processor gives them.

    Args:
        grids: the pairs of frames, rows and columns of patches of each.
        config: the model's configuration.
    """
    vision, grid = config.vision_config, torch.tensor(grids)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(int(grid.prod(1).sum()), width, generator=generator) * 2 - 1
    return {"pixel_values": pixels, "image_grid_thw": grid}


def row(text: str, grids: Sequence[tuple[int, int, int]] = ()) -> torch.Tensor:
    """Return the ids of a message, int64 (length). Each `#` is a picture and each `@` a video, of these grids."""
    tokenizer, rest = AutoTokenizer.from_pretrained(TRAINED), list(grids)
    ids: list[int] = []
    for part in re.split("([#@])", f"<|startoftext|><|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"):
        if part in ("#", "@"):
            ids += [IMAGE if part == "#" else VIDEO] * (math.prod(rest.pop(0)) // 4)
        else:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    assert not rest
    return torch.tensor(ids)


def as_videos(pictures: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give pictures the names that videos have in a call."""
    return {"pixel_values_videos": pictures["pixel_values"], "video_grid_thw": pictures["image_grid_thw"]}
