"""A tiny LFM2-VL checkpoint, pictures for it, and the gold: transformers on one unpadded row at a time.

Its decoder is the trained model of `demo/checkpoint`, so that text varies. Its vision tower has random weights, and its
projector is scaled so that features are as large as embeddings. No test needs pillow or torchvision: pictures are
pixels of random values, as the processor would give them.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, Lfm2VlConfig, PreTrainedModel
from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlForConditionalGeneration

from optimum_lfm2.compat import picture_features


TRAINED = Path(__file__).parents[2] / "demo" / "checkpoint"
IMAGE = 4  # the id of `<image>`
# Special tokens of the trained tokenizer that its texts do not use, and what they are in a processor of LFM2-VL.
RENAMED = {
    "<|endoftext|>": "<|img_thumbnail|>",
    "<|fim_pre|>": "<|image_start|>",
    "<|fim_mid|>": "<image>",
    "<|fim_suf|>": "<|image_end|>",
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_patches": 16,
    "patch_size": 4,
    "vision_use_head": False,
}
# As transformers 4.57 saves it, but for the sizes. It ignores `do_resize` and `size`.
PROCESSOR = {
    "image_processor_type": "Lfm2VlImageProcessorFast",
    "processor_class": "Lfm2VlProcessor",
    "do_resize": True,
    "size": {"height": 512, "width": 512},
    "downsample_factor": 2,
    "encoder_patch_size": 4,
    "min_image_tokens": 4,
    "max_image_tokens": 16,
    "tile_size": 32,
    "resample": 2,
}


@torch.no_grad()
def make_vl_checkpoint(folder: Path, **changes: object) -> Path:
    """Save a checkpoint to `folder`, with its tokenizer. `changes` are options of `Lfm2VlConfig`."""
    text = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32)
    options = {"image_token_id": IMAGE, "projector_hidden_size": 40, **changes}
    vision = VISION | options.pop("vision_config", {})
    config = Lfm2VlConfig(text_config=text.config.to_dict(), vision_config=vision, **options)
    model = Lfm2VlForConditionalGeneration(config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "language_model" in name or "lm_head" in name:
            continue
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 / parameter.shape[1] ** 0.5)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    features = picture_features(model.model, pictures([(2, 2), (1, 3)], config))
    scale = text.model.embed_tokens.weight.norm(dim=1).mean() / features.norm(dim=1).mean()
    for parameter in model.model.multi_modal_projector.linear_2.parameters():
        parameter.mul_(scale)
    model.save_pretrained(folder)
    for path in TRAINED.glob("*token*.json"):
        written = path.read_text(encoding="utf-8")
        for old, new in RENAMED.items():
            written = written.replace(old, new)
        (folder / path.name).write_text(written, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    sizes = {"downsample_factor": config.downsample_factor, "encoder_patch_size": config.vision_config.patch_size}
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | sizes))
    return folder


def gold_vl_model(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def pictures(tokens: Sequence[tuple[int, int]], config: Lfm2VlConfig, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return tiles as the processor gives them, padded to a common length.

    Args:
        tokens: the height and width of each tile in picture tokens.
        config: the model's configuration.
    """
    vision, factor = config.vision_config, config.downsample_factor
    shapes = torch.tensor(tokens) * factor
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(int(shapes.prod(1).max()) + 2) < shapes.prod(1)[:, None]).to(torch.int32)
    width = vision.num_channels * vision.patch_size**2
    pixels = torch.rand(*mask.shape, width, generator=generator) * 2 - 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the pictures of several calls as those of one. Tiles are padded to the longest."""
    if "spatial_shapes" not in parts[0]:
        return {name: torch.cat([part[name] for part in parts if name in part]) for one in parts for name in one}
    longest = max(part["pixel_values"].shape[1] for part in parts)

    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.new_zeros(x.shape[0], longest - x.shape[1], *x.shape[2:])], dim=1)

    return {
        name: torch.cat([part[name] if name == "spatial_shapes" else padded(part[name]) for part in parts])
        for name in parts[0]
    }


def row(text: str, tiles: Sequence[Sequence[tuple[int, int]]] = (), tokenizer=None) -> torch.Tensor:
    """Return the ids of a chat's message, int64 (length). Each `#` of the text is a picture of the given tiles."""
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(TRAINED)
    ids = []
    rest = list(tiles)
    for i, part in enumerate(f"<|startoftext|><|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n".split("#")):
        if i:
            ids += [IMAGE] * sum(height * width for height, width in rest.pop(0))
        ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    assert not rest
    return torch.tensor(ids)


@torch.no_grad()
def gold_vl_tokens(model: PreTrainedModel, ids: torch.Tensor, tiles: dict | None, new: int) -> list[int]:
    """Return transformers' greedy tokens after one unpadded row. It runs without a cache, so no cache can be wrong."""
    embeds = model.get_input_embeddings()(ids)[None]
    tiles = dict(tiles or {})
    videos = [tiles.pop(name) for name in ("pixel_values_videos", "video_grid_thw") if name in tiles]
    if tiles:
        embeds[0, ids == model.config.image_token_id] = picture_features(model, tiles)
    if videos:
        embeds[0, ids == model.config.video_token_id] = torch.cat(model.get_video_features(*videos).pooler_output)
    tokens: list[int] = []
    for _ in range(new):
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
        tokens.append(int(model.lm_head(hidden[0, -1]).argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))], dim=1)
    assert len(set(tokens)) > new // 3, "a gold that repeats itself proves nothing"
    return tokens


def drawn(height: int = 24, width: int = 32) -> np.ndarray:
    """Return a picture, uint8 (height, width, 3). One of 24 x 32 is made of whole patches, so nothing resizes it."""
    return np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_png(path: Path, pixels: np.ndarray) -> Path:
    """Write a picture, uint8 (height, width, 3)."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    content = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(content))
    return path


def processed(pixels: np.ndarray) -> dict[str, torch.Tensor]:
    """Return what transformers' processor makes of a picture that it need not resize: one tile without padding."""
    size = PROCESSOR["encoder_patch_size"]
    height, width, channels = pixels.shape
    rows, columns = height // size, width // size
    patches = (
        pixels.reshape(rows, size, columns, size, channels).transpose(0, 2, 1, 3, 4).reshape(1, rows * columns, -1)
    )
    return {
        "pixel_values": torch.from_numpy(patches.astype(np.float32) / 127.5 - 1),
        "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[rows, columns]]),
    }


def asked(text: str, shown: Sequence[np.ndarray], tokenizer) -> torch.Tensor:
    """Return the ids of a chat as transformers' processor gives them, int64 (length): pictures, then text."""
    content = [*({"type": "image"} for _ in shown), {"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before, *after = prompt.split("<image>")
    side = PROCESSOR["encoder_patch_size"] * PROCESSOR["downsample_factor"]
    for pixels, rest in zip(shown, after, strict=True):
        count = pixels.shape[0] // side * (pixels.shape[1] // side)
        before += f"<|image_start|>{'<image>' * count}<|image_end|>{rest}"
    return torch.tensor(tokenizer(before, add_special_tokens=False)["input_ids"])
