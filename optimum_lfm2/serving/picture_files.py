"""Read a picture that a user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum_lfm2.errors import Lfm2Error


def read_picture(path: Path) -> Any:
    """Return a picture of a file, upright and in RGB, as pillow has it.

    Raises:
        Lfm2Error: the file is none, or pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise Lfm2Error("Pictures need pillow: pip install pillow") from None
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Lfm2Error(f"{path} is no picture that can be read: {' '.join(str(error).split())}") from None
