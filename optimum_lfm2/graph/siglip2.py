"""Siglip2 with LFM2-VL's projector: patches of pictures in, one row for each picture token out. Its record is `TOWER`.

What it must equal is transformers' `modeling_siglip2.py` and the projector of `modeling_lfm2_vl.py`. A large picture
comes as several tiles. Each tile is a grid of patches, row by row, with padding after the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.fields import FLAG, SIZE, Field
from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph import vision_ops as vision
from optimum_lfm2.graph.member import Weight
from optimum_lfm2.graph.tower import PIXELS, Medium, Pictures, ProcessorSettings, Tower


FIRST_PARAMETER = "embeddings.patch_embedding.weight"
PROJECTOR_EPSILON = 1e-5  # torch's default, which transformers' projector takes


@dataclass(frozen=True)
class Tiles:
    """The tiles of one call.

    Attributes:
        height, width: the patches of each tile, int64 (tiles, 1).
        row, column: where each patch is in its tile, int64 (tiles, patches). Those of padding mean nothing.
        bias: added to attention's scores, (tiles, 1, patches, patches).
    """

    height: torch.Tensor
    width: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    bias: torch.Tensor


def inputs(config: PretrainedConfig) -> dict[str, tuple[int | str, ...]]:
    """The inputs: float32 pixels, and int64 masks (0 on padding) and rows and columns of patches, a tile each."""
    vision = config.vision_config
    return {
        "pixel_values": ("num_tiles", "num_patches", vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": ("num_tiles", "num_patches"),
        "spatial_shapes": ("num_tiles", 2),
    }


def image_features(
    pictures: Sequence[torch.Tensor],
    weight: Weight,
    names: Iterable[str],
    config: PretrainedConfig,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Encode tiles and project them to the decoder's width. Arguments and result are those of `Tower.features`."""
    pixel_values, pixel_attention_mask, spatial_shapes = pictures
    # transformers 4.57 has a level `vision_model` in the tower's names, and 5 has not.
    tower = next(name for name in names if name.endswith(FIRST_PARAMETER)).removesuffix(FIRST_PARAMETER)
    projector = f"{tower.partition('vision_tower.')[0]}multi_modal_projector."
    settings = config.vision_config
    longest = (spatial_shapes[:, 0] * spatial_shapes[:, 1]).amax()
    pixel_values, mask = pixel_values[:, :longest], pixel_attention_mask[:, :longest]  # the rest is padding
    tiles = read_tiles(pixel_values, mask, spatial_shapes, dtype)

    name = f"{tower}embeddings."
    patches = pixel_values.to(dtype)
    hidden = ops.linear(patches, weight(f"{name}patch_embedding.weight"), weight(f"{name}patch_embedding.bias"))
    hidden = hidden + positions(tiles, weight(f"{name}position_embedding.weight"), settings).to(dtype)
    for i in range(settings.num_hidden_layers):
        hidden = encoder_layer(hidden, tiles, weight, f"{tower}encoder.layers.{i}", settings)
    hidden = _norm(hidden, weight, f"{tower}post_layernorm", settings.layer_norm_eps)
    return project(hidden, tiles, weight, projector, config).to(torch.float32)


def read_tiles(
    pixel_values: torch.Tensor, mask: torch.Tensor, spatial_shapes: torch.Tensor, dtype: torch.dtype
) -> Tiles:
    """What all layers share. The arguments are those of `image_features`."""
    patches = pixel_values.shape[1]
    height, width = spatial_shapes[:, :1], spatial_shapes[:, 1:]
    row, column = vision.divided(torch.arange(patches)[None], width)
    nothing = torch.zeros((), dtype=dtype)
    masked = torch.where(mask == 0, torch.full((), ops.MASKED, dtype=dtype), nothing)
    return Tiles(
        height=height,
        width=width,
        row=row,
        column=column,
        bias=masked[:, None, None, :].expand(-1, 1, patches, -1),
    )


def positions(tiles: Tiles, table: torch.Tensor, settings: PretrainedConfig) -> torch.Tensor:
    """The position embedding of each patch, float32 (tiles, patches, width): the table, resized to each tile's grid.

    As `F.interpolate(mode="bilinear", align_corners=False, antialias=True)`, which is linear: the weights of an axis
    are a triangle around the patch's place in the table.
    """
    size = int(settings.num_patches**0.5)
    across = [_axis_weights(tiles.row, tiles.height, size), _axis_weights(tiles.column, tiles.width, size)]
    weights = across[0][..., :, None] * across[1][..., None, :]
    return vision.weighted(weights, table)


def _axis_weights(index: torch.Tensor, count: torch.Tensor, size: int) -> torch.Tensor:
    """Weights of the table's rows (or columns) for each patch: (tiles, patches), (tiles, 1) → (…, size)."""
    scale = size / count.to(torch.float32)
    centre = (index.to(torch.float32) + 0.5) * scale - 0.5
    distance = (torch.arange(size, dtype=torch.float32) - centre[..., None]).abs()
    weights = (1 - distance / scale.clamp(min=1)[..., None]).clamp(min=0)
    # Padding lies outside the table, and must stay finite.
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def encoder_layer(
    hidden: torch.Tensor, tiles: Tiles, weight: Weight, name: str, settings: PretrainedConfig
) -> torch.Tensor:
    """One layer: (tiles, patches, width) → the same. The norms come before the blocks."""

    def linear(x: torch.Tensor, part: str) -> torch.Tensor:
        return ops.linear(x, weight(f"{name}.{part}.weight"), weight(f"{name}.{part}.bias"))

    normed = _norm(hidden, weight, f"{name}.layer_norm1", settings.layer_norm_eps)
    query, key, value = (linear(normed, f"self_attn.{part}_proj") for part in "qkv")
    context = vision.attention(query, key, value, tiles.bias, settings.num_attention_heads)
    hidden = hidden + linear(context, "self_attn.out_proj")

    normed = _norm(hidden, weight, f"{name}.layer_norm2", settings.layer_norm_eps)
    return hidden + linear(vision.ACTIVATIONS[settings.hidden_act](linear(normed, "mlp.fc1")), "mlp.fc2")


def project(hidden: torch.Tensor, tiles: Tiles, weight: Weight, name: str, config: PretrainedConfig) -> torch.Tensor:
    """Join blocks of `downsample_factor` ² patches to tokens of the decoder's width, and drop the padding."""
    factor = config.downsample_factor
    # The patches of every token that the longest tile could have; those that a tile has not are dropped.
    blocks_in_row = (tiles.width // factor).clamp(min=1)
    count = (tiles.height // factor) * (tiles.width // factor)
    token = torch.arange(tiles.row.shape[1] // factor**2)[None]
    block_row, block_column = vision.divided(token, blocks_in_row)
    first = block_row * factor * tiles.width + block_column * factor
    first = first + (torch.arange(tiles.row.shape[0]) * tiles.row.shape[1])[:, None]
    offset = torch.arange(factor)
    within = (offset[:, None] * tiles.width[..., None] + offset).flatten(1)  # (tiles, factor²), row by row
    index = (first[..., None] + within[:, None]).reshape(-1, factor**2)
    index = vision.chosen(index, (token < count).reshape(-1))

    def linear(x: torch.Tensor, part: str) -> torch.Tensor:
        bias = weight(f"{name}{part}.bias") if config.projector_bias else None
        return ops.linear(x, weight(f"{name}{part}.weight"), bias)

    patches = shapes.resized(hidden, (-1, config.vision_config.hidden_size))
    joined = vision.gathered(patches, index)
    if getattr(config, "projector_use_layernorm", True):  # a switch since transformers 5
        joined = _norm(joined, weight, f"{name}layer_norm", PROJECTOR_EPSILON)
    return linear(vision.ACTIVATIONS[config.projector_hidden_act](linear(joined, "linear_1")), "linear_2")


def _norm(x: torch.Tensor, weight: Weight, name: str, epsilon: float) -> torch.Tensor:
    return vision.layer_norm(x, weight(f"{name}.weight"), weight(f"{name}.bias"), epsilon)


def sizes(config: PretrainedConfig) -> list[tuple[int, int]]:
    """Return sizes in picture tokens: one, tall, wide, as large as the table of positions, and larger than that."""
    side = max(1, int(config.vision_config.num_patches**0.5) // config.downsample_factor)
    return [(1, 1), (side, 1), (1, side + 1), (side, side), (side + 1, side // 2 + 1)]


def sample(config: PretrainedConfig, blocks: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Return pictures of random pixels, padded to the longest with noise, which must change nothing.

    Args:
        config: the configuration of a whole model.
        blocks: the height and width of each picture in picture tokens.
    """
    vision, factor = config.vision_config, config.downsample_factor
    shapes = torch.tensor(blocks) * factor
    counts = shapes.prod(1)
    generator = torch.Generator().manual_seed(0)
    width = vision.num_channels * vision.patch_size**2
    mask = (torch.arange(int(counts.max()) + 3)[None] < counts[:, None]).to(torch.int64)
    pixels = torch.rand(*mask.shape, width, generator=generator) * 2 - 1
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }


def alone(pictures: Pictures) -> Iterator[dict[str, torch.Tensor]]:
    """Yield each picture by itself and without padding."""
    for i, count in enumerate(pictures["spatial_shapes"].prod(1).tolist()):
        one = {name: values[i : i + 1] for name, values in pictures.items()}
        yield one | {name: one[name][:, :count] for name in ("pixel_values", "pixel_attention_mask")}


def check_call(given: Mapping[str, torch.Tensor], config: PretrainedConfig) -> None:
    """Raise `Lfm2Error` for tiles that do not fit each other or the model. As `Tower.check_call` says."""
    pixels, mask, shapes = given.values()
    width = config.vision_config.num_channels * config.vision_config.patch_size**2
    tiles, patches = pixels.shape[:2]
    fits = pixels.dim() == 3 and pixels.shape[2] == width
    if not fits or tuple(mask.shape) != (tiles, patches) or tuple(shapes.shape) != (tiles, 2):
        raise Lfm2Error(
            f"pixel_values {tuple(pixels.shape)}, pixel_attention_mask {tuple(mask.shape)} and spatial_shapes "
            f"{tuple(shapes.shape)} do not fit: give (tiles, patches, {width}), (tiles, patches) and (tiles, 2)."
        )
    if bool((shapes < 1).any()) or int(shapes.prod(1).max()) > patches:
        raise Lfm2Error(f"spatial_shapes {shapes.tolist()} asks for more patches than pixel_values has, or none.")


FIELDS = {
    "model_type": Field(str, values=("siglip2_vision_model",)),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": Field(int, 1, 1024),
    "num_attention_heads": SIZE,
    "num_channels": Field(int, 1, 64),
    "patch_size": Field(int, 1, 1024),
    "num_patches": Field(int, 1, 2**16),
    "hidden_act": Field(str, values=tuple(vision.ACTIVATIONS)),
    "layer_norm_eps": Field(float, 0, 1),
    "vision_use_head": FLAG,
}


def check(tower: Mapping[str, Any]) -> None:
    """Raise `Lfm2Error` for a `vision_config` whose graph would be wrong. `FIELDS` are checked already."""
    patches = tower.get("num_patches", 256)
    if math.isqrt(patches) ** 2 != patches:
        raise Lfm2Error(f"num_patches in the vision_config of config.json is {patches}, which is no square.")
    width, heads = tower.get("hidden_size", 768), tower.get("num_attention_heads", 12)
    if width % heads:
        raise Lfm2Error(
            f"The vision_config of config.json contradicts itself: num_attention_heads {heads} does not divide "
            f"hidden_size {width}."
        )


PROCESSOR = ProcessorSettings(
    defaults={
        "encoder_patch_size": 16,
        "downsample_factor": 2,
        "min_image_tokens": 64,
        "max_image_tokens": 256,
        "tile_size": 512,
        "resample": 2,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    fields={
        **dict.fromkeys(("encoder_patch_size", "downsample_factor", "tile_size"), SIZE),
        **dict.fromkeys(("min_image_tokens", "max_image_tokens"), SIZE),
        **PIXELS,
    },
    shared={
        "encoder_patch_size": lambda config: config.vision_config.patch_size,
        "downsample_factor": lambda config: config.downsample_factor,
    },
    # transformers saves the setting and ignores it. Transformers.js would squeeze every picture to a square first.
    written={"do_resize": False},
)

TOWER = Tower(
    inputs=inputs,
    features=image_features,
    modules=("vision_tower", "multi_modal_projector"),
    media=(Medium("picture", "image_token_id", ("pixel_values", "pixel_attention_mask", "spatial_shapes")),),
    sizes=sizes,
    sample=sample,
    alone=alone,
    pieces=alone,
    check_call=check_call,
    fields=FIELDS,
    check=check,
    processor=PROCESSOR,
)
