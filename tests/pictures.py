"""A tiny LFM2-VL checkpoint, pictures for it, and the gold: transformers on one unpadded row at a time.

Its decoder is the trained model of `demo/checkpoint`, so that text varies. Its vision tower has random weights, and its
projector is scaled so that features are as large as embeddings. No test needs pillow or torchvision: pictures are
pixels of random values, as the processor would give them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, Lfm2VlConfig, PreTrainedModel
from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlForConditionalGeneration

from optimum_lfm2.compat import picture_features


TRAINED = Path(__file__).parent.parent / "demo" / "checkpoint"
IMAGE = 4  # a special token of the trained tokenizer that its texts do not use
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
PROCESSOR = {"image_processor_type": "Lfm2VlImageProcessorFast", "downsample_factor": 2, "encoder_patch_size": 4}


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
        shutil.copy(path, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
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
    """Return the tiles of several calls as those of one, padded to the longest."""
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
    if tiles is not None:
        embeds[0, ids == model.config.image_token_id] = picture_features(model, tiles)
    tokens: list[int] = []
    for _ in range(new):
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
        tokens.append(int(model.lm_head(hidden[0, -1]).argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))], dim=1)
    assert len(set(tokens)) > new // 3, "a gold that repeats itself proves nothing"
    return tokens
