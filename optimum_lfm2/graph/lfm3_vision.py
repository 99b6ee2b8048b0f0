"""LFM3-VL's tower with its projector: patches of pictures and videos in, a row for each picture token out.

Its record is `TOWER`. What it must equal is transformers' `modeling_lfm3_vl.py`. A patch spans a pair of frames
(`temporal_patch_size`), and a picture is a video of one pair. The patches of all pictures of a call lie one after the
other without padding. Those of a pair lie block by block: each block of `spatial_merge_size` ² patches becomes one
picture token. Layers mix patches of one pair alone. It is called a frame below.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.fields import POSITIVE, SIZE, Field
from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph import vision_ops as vision
from optimum_lfm2.graph.blocks import AttentionParts, attention, feed_forward
from optimum_lfm2.graph.lfm3_frames import THETA, Frames, read_frames
from optimum_lfm2.graph.member import Weight
from optimum_lfm2.graph.tower import PIXELS, Medium, Pictures, ProcessorSettings, Tower


CONV, FULL_ATTENTION = "conv", "full_attention"
AXIAL = "axial"
ATTENTION = AttentionParts(norm="norm")
PROJECTOR_EPSILON = 1e-6


def inputs(config: PretrainedConfig) -> dict[str, tuple[int | str, ...]]:
    """The inputs: float32 pixels, and int64 pairs of frames, rows and columns of patches, one of each a picture."""
    return {"pixel_values": ("num_patches", _values(config)), "image_grid_thw": ("num_images", 3)}


def _values(config: PretrainedConfig) -> int:
    """The values of a patch."""
    vision = config.vision_config
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def image_features(
    pictures: Sequence[torch.Tensor],
    weight: Weight,
    names: Iterable[str],
    config: PretrainedConfig,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Encode patches and project blocks of them to the decoder's width. As `Tower.features` says."""
    pixels, grid = pictures
    settings = config.vision_config
    embedding = "vision_tower.patch_embed.weight"
    prefix = next(name for name in names if name.endswith(embedding)).removesuffix(embedding)
    tower = f"{prefix}vision_tower."
    frames = read_frames(pixels, grid, settings, dtype)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return ops.rms_norm(x, weight(f"{tower}{name}.weight"), settings.norm_eps)

    hidden = shapes.resized(pixels.to(dtype), (1, -1, _values(config)))
    hidden = norm(ops.linear(hidden, weight(f"{prefix}{embedding}")), "embedding_norm")
    for i, kind in enumerate(settings.layer_types[: settings.num_hidden_layers]):
        hidden = layer(hidden, kind, frames, weight, f"{tower}layers.{i}", settings)
    return project(hidden, weight, f"{prefix}multi_modal_projector.", config).to(torch.float32)


def layer(
    hidden: torch.Tensor, kind: str, frames: Frames, weight: Weight, name: str, settings: PretrainedConfig
) -> torch.Tensor:
    """One layer: (1, patches, width) → the same. The norms come before the blocks."""
    normed = ops.rms_norm(hidden, weight(f"{name}.operator_norm.weight"), settings.norm_eps)
    if kind == CONV:
        out = gated_conv(normed, frames, weight, f"{name}.conv", settings)
    else:
        out, _, _ = attention(normed, None, frames, weight, f"{name}.self_attn", settings, ATTENTION)
    normed, hidden = ops.skip_rms_norm(out, hidden, weight(f"{name}.ffn_norm.weight"), settings.norm_eps)
    return hidden + feed_forward(normed, weight, f"{name}.feed_forward")


def gated_conv(
    hidden: torch.Tensor, frames: Frames, weight: Weight, name: str, settings: PretrainedConfig
) -> torch.Tensor:
    """The gated convolution over the grid of a frame: (1, patches, width) → the same.

    Each tap takes the patches that it sees by their numbers, so that frames need neither padding nor another order.
    """
    width = settings.hidden_size
    gates = ops.linear(hidden, weight(f"{name}.in_proj.weight"))
    input_gate, output_gate, x = shapes.parts(gates, width, width, width)
    rows = shapes.pad(input_gate * x, axis=1, after=1)  # zeros: a place outside the frame
    kernel = weight(f"{name}.spatial_conv.weight", kernel=True)
    mixed = sum(shapes.picked(rows, near, axis=1) * kernel[tap] for tap, near in enumerate(frames.near))
    return ops.linear(output_gate * mixed, weight(f"{name}.out_proj.weight"))


def project(hidden: torch.Tensor, weight: Weight, name: str, config: PretrainedConfig) -> torch.Tensor:
    """Join blocks of patches, which lie side by side, to tokens: (picture tokens, hidden_size) of the decoder."""
    vision_config = config.vision_config

    def linear(x: torch.Tensor, part: str) -> torch.Tensor:
        bias = weight(f"{name}{part}.bias") if config.projector_bias else None
        return ops.linear(x, weight(f"{name}{part}.weight"), bias)

    scale, shift = (weight(f"{name}layer_norm.{part}") for part in ("weight", "bias"))
    normed = vision.layer_norm(hidden, scale, shift, PROJECTOR_EPSILON)
    joined = shapes.resized(normed, (-1, vision_config.hidden_size * vision_config.spatial_merge_size**2))
    return linear(vision.ACTIVATIONS[config.projector_hidden_act](linear(joined, "linear_1")), "linear_2")


def sizes(config: PretrainedConfig) -> list[tuple[int, int]]:
    """Return sizes in picture tokens: one, tall, wide, square, large."""
    return [(1, 1), (6, 1), (1, 7), (4, 4), (5, 9)]


def sample(config: PretrainedConfig, blocks: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Return pictures of random pixels. Every second one is a video of two pairs of frames.

    Args:
        config: the configuration of a whole model.
        blocks: the height and width of each picture in picture tokens.
    """
    merge = config.vision_config.spatial_merge_size
    grid = torch.tensor([(1 + i % 2, height * merge, width * merge) for i, (height, width) in enumerate(blocks)])
    pixels = torch.rand(int(grid.prod(1).sum()), _values(config), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"pixel_values": pixels, "image_grid_thw": grid}


def alone(pictures: Pictures) -> Iterator[dict[str, torch.Tensor]]:
    """Yield each picture and each video by itself."""
    pixels, grid = pictures["pixel_values"], pictures["image_grid_thw"]
    for i, patches in enumerate(pixels.split(grid.prod(1).tolist())):
        yield {"pixel_values": patches, "image_grid_thw": grid[i : i + 1]}


def frame_by_frame(pictures: Pictures) -> Iterator[dict[str, torch.Tensor]]:
    """Yield each pair of frames as a picture of its own: layers mix patches of one pair alone."""
    for one in alone(pictures):
        ((count, height, width),) = one["image_grid_thw"].tolist()
        for patches in one["pixel_values"].split([height * width] * count):
            yield {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, height, width]])}


def check_call(given: Mapping[str, torch.Tensor], config: PretrainedConfig) -> None:
    """Raise `Lfm2Error` for pixels and a grid that do not fit each other or the model. As `Tower.check_call` says."""
    (pixels_name, pixels), (grid_name, grid) = given.items()
    width = _values(config)
    if pixels.dim() != 2 or pixels.shape[1] != width or grid.dim() != 2 or grid.shape[1] != 3:
        raise Lfm2Error(
            f"{pixels_name} {tuple(pixels.shape)} and {grid_name} {tuple(grid.shape)} do not fit: "
            f"give (patches, {width}) and (pictures, 3)."
        )
    merge = config.vision_config.spatial_merge_size
    if bool((grid < 1).any()) or bool((grid[:, 1:] % merge != 0).any()):
        raise Lfm2Error(
            f"{grid_name} is {grid.tolist()}: each picture has 1 or more pairs of frames, and rows and columns of "
            f"patches in multiples of {merge}."
        )
    if (count := int(grid.prod(1).sum())) != len(pixels):
        raise Lfm2Error(f"{grid_name} {grid.tolist()} asks for {count} patches, and {pixels_name} has {len(pixels)}.")


FIELDS = {
    "model_type": Field(str, values=("lfm3_vl_vision",)),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": Field(int, 1, 1024),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "layer_types": Field(str, optional=True, many=True, values=(CONV, FULL_ATTENTION)),
    "conv_kernel_size": Field(int, 1, 63),
    "in_channels": Field(int, 1, 64),
    "patch_size": Field(int, 1, 1024),
    "temporal_patch_size": Field(int, 1, 64),
    "spatial_merge_size": Field(int, 1, 16),
    "norm_eps": Field(float, 0, 1),
    "rope_parameters": Field(dict, optional=True),
}
PLACE = "in the vision_config of config.json"


def check(tower: Mapping[str, Any]) -> None:
    """Raise `Lfm2Error` for a `vision_config` whose graph would be wrong. `FIELDS` are checked already."""
    width, heads, shared = (
        tower.get(field, default)
        for field, default in (("hidden_size", 1024), ("num_attention_heads", 16), ("num_key_value_heads", 8))
    )
    if width % heads or width // heads % 4:
        raise Lfm2Error(
            f"hidden_size {PLACE} is {width}; it has to be a multiple of 4 * num_attention_heads, {4 * heads}."
        )
    if heads % shared:
        raise Lfm2Error(f"num_key_value_heads {PLACE} is {shared}, which does not divide num_attention_heads {heads}.")
    if tower.get("head_dim") not in (None, width // heads):
        raise Lfm2Error(
            f"head_dim {PLACE} is {tower['head_dim']}, and hidden_size / num_attention_heads {width // heads}."
        )
    if tower.get("conv_kernel_size", 3) % 2 == 0:
        raise Lfm2Error(f"conv_kernel_size {PLACE} is {tower['conv_kernel_size']}; it has to be odd.")
    layers, types = tower.get("num_hidden_layers", 14), tower.get("layer_types")
    if types is not None and len(types) != layers:
        raise Lfm2Error(f"layer_types {PLACE} has {len(types)} layers, and num_hidden_layers is {layers}.")
    rope = tower.get("rope_parameters") or {}
    if rope.get("rope_type", AXIAL) != AXIAL or not POSITIVE.takes(rope.get("rope_theta", THETA)):
        raise Lfm2Error(
            f"rope_parameters {PLACE} is {rope}; it has to have the rope_type {AXIAL} and a positive rope_theta."
        )


PROCESSOR = ProcessorSettings(
    # Of transformers' Qwen2VLImageProcessor, which LFM3-VL's processor has.
    defaults={
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "resample": 3,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    fields={
        **dict.fromkeys(("patch_size", "temporal_patch_size", "merge_size"), SIZE),
        "size": Field(dict),
        **PIXELS,
    },
    shared={
        "patch_size": lambda config: config.vision_config.patch_size,
        "temporal_patch_size": lambda config: config.vision_config.temporal_patch_size,
        "merge_size": lambda config: config.vision_config.spatial_merge_size,
    },
    # Transformers.js (4.3.2) has a class of this name, for several pictures. transformers has none.
    written={"image_processor_type": "Lfm3VlImageProcessor"},
    apart=True,
)

TOWER = Tower(
    inputs=inputs,
    features=image_features,
    modules=("vision_tower", "multi_modal_projector"),
    media=(
        Medium("picture", "image_token_id", ("pixel_values", "image_grid_thw")),
        Medium("video", "video_token_id", ("pixel_values_videos", "video_grid_thw")),
    ),
    sizes=sizes,
    sample=sample,
    alone=alone,
    pieces=frame_by_frame,
    check_call=check_call,
    fields=FIELDS,
    check=check,
    processor=PROCESSOR,
)
