"""What `test_processor.py` needs torchvision for: `python torchvision_python.py processor_child.py EXPORT`.

It writes to the current folder: picture files, `inputs.pt` with what transformers' processor makes of each of them
beside what `demo/patches.py` makes of it, and `said.json` with answers and errors.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import runpy
import sys
from pathlib import Path

import pages
import torch
from ask import read
from drawings import draw
from patches import fit, patches
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.utils.logging import set_verbosity_error

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration


QUESTION, OF_SNIPPETS = "Describe the picture.", "What is in this picture?"
# Heights and widths in pixels. The last one is cut into tiles.
SIZES = {
    "as drawn": (128, 96),
    "tall": (400, 150),
    "wide": (90, 300),
    "very wide": (60, 700),
    "tiny": (9, 7),
    "photo": (480, 640),
    "tiled": (300, 420),
}


def write_pictures(folder: Path) -> None:
    """Write a picture file of each size: one with colours by number, one with an alpha channel."""
    for i, (name, (height, width)) in enumerate(SIZES.items()):
        drawn = Image.fromarray(draw(random.Random(i), (128, 96)).pixels())
        drawn.resize((width, height), Image.Resampling.NEAREST).save(folder / f"{name}.png")
    Image.open(folder / "tall.png").convert("P").save(folder / "tall.png")
    Image.open(folder / "wide.png").convert("RGBA").save(folder / "wide.png")
    Image.open(folder / "photo.png").save(folder / "picture.jpg")
    (folder / "broken.png").write_bytes((folder / "photo.png").read_bytes()[:60])


def chat(path: str, question: str = QUESTION) -> list[dict]:
    content = [{"type": "image", "image": path}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def error_of(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except (Exception, SystemExit) as error:
        return str(error)
    return ""


def printed(function, *args) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*args)
    return out.getvalue()


def ask(export: Path, picture: str) -> str:
    sys.argv = ["ask.py", str(export), "--picture", picture, "--question", QUESTION]
    return printed(lambda: runpy.run_path(str(pages.ROOT / "demo" / "ask.py"), run_name="__main__")).splitlines()[-1]


def main(export: Path) -> None:
    folder = Path.cwd()
    write_pictures(folder)
    processor = AutoProcessor.from_pretrained(export)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = {}
    for name in SIZES:
        path = f"{name}.png"
        tiled = {"do_image_splitting": True} if name == "tiled" else {}
        inputs[name] = dict(processor.apply_chat_template(chat(path), **options, **tiled))
        inputs[f"{name}, by the demo"] = patches(fit(read(Path(path)))[None])
    inputs["picture.jpg"] = dict(processor.apply_chat_template(chat("picture.jpg", OF_SNIPPETS), **options))
    torch.save(inputs, folder / "inputs.pt")

    model = ORTLfm2VlForConditionalGeneration.from_pretrained(export)
    describe = pipeline("image-text-to-text", model=model, processor=processor)
    snippets = {}
    for page in ("README.md", "docs/vision.md"):
        for snippet in pages.snippets(page):
            if "AutoProcessor" in snippet:
                snippets[page] = printed(exec, compile(snippet, page, "exec"), {})
    said = {
        "snippets": snippets,
        "pipeline": describe(text=chat("photo.png"), max_new_tokens=24, do_sample=False, return_full_text=False),
        "ask": ask(export, "photo.png"),
        "broken": error_of(processor.apply_chat_template, chat("broken.png"), **options),
        "broken, asked": error_of(ask, export, "broken.png"),
    }
    (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    set_verbosity_error()
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
