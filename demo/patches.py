"""What the demo model takes for a picture. transformers' processor gives the same, but needs torchvision for it."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F


PATCH = 16  # pixels
FACTOR = 2  # a picture token stands for so many rows and columns of patches
SIDE = PATCH * FACTOR
LEAST_TOKENS, MOST_TOKENS = 9, 16  # of a picture


def size_for(height: int, width: int) -> tuple[int, int]:
    """Return the size to which the processor brings a picture of this size: multiples of `SIDE`."""
    sides = [max(SIDE, round(side / SIDE) * SIDE) for side in (height, width)]
    least, most = (tokens * SIDE**2 for tokens in (LEAST_TOKENS, MOST_TOKENS))
    if math.prod(sides) > most:
        shrink = math.sqrt(height * width / most)
        sides = [max(SIDE, math.floor(side / shrink / SIDE) * SIDE) for side in (height, width)]
    elif math.prod(sides) < least:
        grow = math.sqrt(least / (height * width))
        sides = [math.ceil(side * grow / SIDE) * SIDE for side in (height, width)]
    return sides[0], sides[1]


def fit(picture: np.ndarray) -> np.ndarray:
    """Bring a picture, uint8 (height, width, 3), to the size that the model takes."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].contiguous()
    sized = F.interpolate(pixels, size_for(*picture.shape[:2]), mode="bilinear", antialias=True)
    return sized[0].permute(1, 2, 0).numpy()


def patches(pictures: np.ndarray) -> dict[str, torch.Tensor]:
    """Cut pictures of one size into patches.

    Args:
        pictures: uint8 (pictures, height, width, 3). Height and width are multiples of `SIDE`.

    Returns:
        What transformers' `Lfm2VlImageProcessor` returns: `pixel_values`, float32 (pictures, patches, 16 * 16 * 3)
        between -1 and 1; `pixel_attention_mask`, int32 (pictures, patches), 0 on padding; `spatial_shapes`, int64
        (pictures, 2), the rows and columns of patches.
    """
    count, height, width, channels = pictures.shape
    rows, columns = height // PATCH, width // PATCH
    pixels = torch.from_numpy(pictures).to(torch.float32) / 127.5 - 1
    cut = pixels.view(count, rows, PATCH, columns, PATCH, channels).transpose(2, 3)
    values = torch.zeros(count, max(rows * columns, MOST_TOKENS * FACTOR**2), PATCH * PATCH * channels)
    values[:, : rows * columns] = cut.reshape(count, rows * columns, -1)
    mask = torch.zeros(values.shape[:2], dtype=torch.int32)
    mask[:, : rows * columns] = 1
    return {
        "pixel_values": values,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[rows, columns]] * count),
    }
