"""Run a script with torchvision, for transformers' processor of pictures: `python torchvision_python.py SCRIPT ...`.

The Makefile puts PyPI's torchvision and pillow into a folder of each environment. The compiled parts of a torchvision
load only beside the torch that it was built for, and PyPI's is built for CUDA. The processor uses its Python parts,
which can be imported once two operators are declared. transformers 5 decodes files by a compiled part, and transformers
4.57 by pillow. Without the compiled part, pillow does it for both.

All this must happen before transformers is imported, and so in a process of its own.
"""

from __future__ import annotations

import importlib.util
import io
import runpy
import sys
from pathlib import Path
from typing import Any

import torch


FOLDER = Path(sys.prefix) / "torchvision"
DECLARED = ("nms", "qnms")  # torchvision 0.28 says at import what these return, without looking whether they are there
_libraries = []


def is_installed() -> bool:
    """Return whether `provide` would find a torchvision and pillow."""
    return FOLDER.is_dir() or all(importlib.util.find_spec(name) for name in ("torchvision", "PIL"))


def provide() -> None:
    """Let `import torchvision` and `import PIL` succeed: with those of the environment, or those of the folder."""
    sys.path.append(str(FOLDER))
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    if not _loads(folder / "_C.so"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in DECLARED:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)  # its operators go when it does
    if not _loads(folder / "image.so"):
        import torchvision.io

        torchvision.io.decode_image = _decode


def _loads(path: Path) -> bool:
    try:
        torch.ops.load_library(path)
    except OSError:
        return False
    return True


def _decode(source: str | torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Read a picture from a file or from its bytes: uint8 (3, height, width), upright."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    image = Image.open(source if isinstance(source, str) else io.BytesIO(source.numpy().tobytes()))
    return pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))


if __name__ == "__main__":
    provide()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
