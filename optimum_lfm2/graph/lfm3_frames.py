"""The frames of a call of LFM3-VL's tower: where each patch lies, which patches it sees, and its angles.

The reference is `Lfm3VlVisionAttention` and `Lfm3VlVisionRotaryEmbedding` of transformers. `lfm3_vision.py` says what
a frame is, and in which order patches lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from optimum_lfm2.caches import head_dim
from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph import vision_ops as vision
from optimum_lfm2.graph.call import Rotation


THETA = 1e6  # transformers' default


@dataclass(frozen=True)
class Frames:
    """The patches of one call.

    Attributes:
        rotation: the angles of the patches, by their rows and columns.
        near: for each tap of a kernel, row by row, the patch that it sees, int64 (patches). The number of patches
            stands for a place outside the frame.
        even, seats, masked, seat: as `vision_ops.attention_of_frames` says.
    """

    rotation: Rotation
    near: tuple[torch.Tensor, ...]
    even: torch.Tensor
    seats: torch.Tensor
    masked: torch.Tensor
    seat: torch.Tensor

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past: tuple[torch.Tensor, ...] | None,
        config: PretrainedConfig,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Compute attention of all patches of a frame to each other.

        Args:
            query: (1, patches, heads * head_dim), rotated.
            key, value: (1, patches, kv_heads * head_dim), the key rotated.
            past: None, for a tower has no caches.
            scale: the factor of the scores; None for `head_dim ** -0.5`.

        Returns:
            The context, of the shape of `query`, and no caches.
        """
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
        if kv_heads < heads:  # each query head gets a copy of the head that it shares
            shared = torch.arange(heads) // (heads // kv_heads)
            by_head = (shapes.resized(x, (0, 0, kv_heads, dim)) for x in (key, value))
            copies = (shapes.picked(x, shared, axis=2) for x in by_head)
            key, value = (shapes.resized(x, (0, 0, heads * dim)) for x in copies)
        seated = (self.even, self.seats, self.masked, self.seat)
        return vision.attention_of_frames(query, key, value, *seated, heads, scale), (), ()


def read_frames(pixels: torch.Tensor, grid: torch.Tensor, settings: PretrainedConfig, dtype: torch.dtype) -> Frames:
    """What all layers share. The first two arguments are the graph's inputs."""
    pairs, heights, widths = (grid[:, axis] for axis in range(3))
    areas = heights * widths
    first_patch, first_frame = ((x.cumsum(0) - x) for x in (pairs * areas, pairs))

    patch = torch.arange(pixels.shape[0])
    picture = (patch[:, None] >= first_patch + pairs * areas).sum(1)
    height, width, area = (shapes.picked(x, picture, axis=0) for x in (heights, widths, areas))
    frame, place = vision.divided(patch - shapes.picked(first_patch, picture, axis=0), area)
    row, column = row_and_column(place, width, settings.spatial_merge_size)
    near = neighbours(patch, place, row, column, height, width, settings)

    number = vision.counted(pairs.sum())
    owner = (number[:, None] >= first_frame + pairs).sum(1)
    length = shapes.picked(areas, owner, axis=0)[:, None]
    begin = (
        shapes.picked(first_patch, owner, axis=0) + (number - shapes.picked(first_frame, owner, axis=0)) * length[:, 0]
    )
    longest = areas.amax()
    columns = vision.counted(longest)[None]
    taken = columns < length
    seats = torch.where(taken, begin[:, None] + columns, torch.zeros((), dtype=torch.int64))
    masked = torch.where(taken, torch.zeros((), dtype=dtype), torch.full((), ops.MASKED, dtype=dtype))
    return Frames(
        rotation=rotation(row, column, settings, dtype),
        near=near,
        even=number.shape[0] * longest == patch.shape[0],
        seats=seats,
        masked=masked,
        seat=(shapes.picked(first_frame, picture, axis=0) + frame) * longest + place,
    )


def row_and_column(place: torch.Tensor, width: torch.Tensor, merge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in its frame a patch is, which lies at a place of the order block by block: int64 (patches) each."""
    side = torch.full((), merge)
    block, corner = vision.divided(place, side * side)
    block_row, block_column = vision.divided(block, width // merge)
    down, right = vision.divided(corner, side)
    return block_row * merge + down, block_column * merge + right


def neighbours(
    patch: torch.Tensor,
    place: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    height: torch.Tensor,
    width: torch.Tensor,
    settings: PretrainedConfig,
) -> tuple[torch.Tensor, ...]:
    """Return `Frames.near`. The arguments are int64 (patches): undo `row_and_column` for each tap's row and column."""
    taps, merge = settings.conv_kernel_size, settings.spatial_merge_size
    begin, outside = patch - place, patch[-1] + 1
    side = torch.full((), merge)

    def at(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        (block_row, down), (block_column, right) = vision.divided(row, side), vision.divided(column, side)
        block = block_row * (width // merge) + block_column
        return torch.where(inside, begin + block * merge**2 + down * merge + right, outside)

    offsets = range(-(taps // 2), taps - taps // 2)
    return tuple(at(row + down, column + right) for down in offsets for right in offsets)


def rotation(row: torch.Tensor, column: torch.Tensor, settings: PretrainedConfig, dtype: torch.dtype) -> Rotation:
    """The angles of the patches: half of them are of its row, and half of its column."""
    half = head_dim(settings) // 2
    theta = (getattr(settings, "rope_parameters", None) or {}).get("rope_theta", THETA)
    frequencies = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    tables = ops.rotary_table(torch.stack([row, column], dim=1), frequencies, 1.0, dtype)
    return Rotation(torch.arange(row.shape[0])[None], *(shapes.resized(table, (-1, half)) for table in tables))
