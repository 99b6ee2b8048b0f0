"""Ask an export of the demo checkpoint that sees.

    python demo/ask.py FOLDER                          # about a picture that is drawn here
    python demo/ask.py FOLDER --picture photo.png --question "How many circles are there?"

Your own picture needs pillow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from drawings import drawings
from patches import SIDE, fit, patches
from questions import questions
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration


def read(path: Path) -> np.ndarray:
    """Read a picture file: uint8 (height, width, 3)."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise SystemExit("Your own picture needs pillow: pip install pillow") from None
    try:
        return np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SystemExit(f"{path} is no picture that can be read: {error}") from None


def show(pixels: np.ndarray) -> str:
    """Return a picture in characters of a terminal. Each has the colours of two pixels, one above the other."""
    step = max(1, max(pixels.shape) // 40)
    upper, lower = pixels[:: 2 * step, ::step], pixels[step :: 2 * step, ::step]
    lines = []
    for above, below in zip(upper, lower, strict=False):
        cells = zip(above.tolist(), below.tolist(), strict=True)
        lines.append("".join("\033[38;2;{};{};{};48;2;{};{};{}m▀".format(*one, *other) for one, other in cells))
    return "\n".join(f"{line}\033[0m" for line in lines)


def prompt(tokenizer: PreTrainedTokenizerBase, pixels: np.ndarray, question: str) -> str:
    """Return a chat about a picture, uint8 (height, width, 3), which has a size that the model takes."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    places = tokenizer.image_token * (pixels.shape[0] * pixels.shape[1] // SIDE**2)
    return text.replace(tokenizer.image_token, f"{tokenizer.image_start_token}{places}{tokenizer.image_end_token}")


def answers(
    model: ORTLfm2VlForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[np.ndarray, str]],
) -> list[str]:
    """Return what the model says to questions, each about a picture as `prompt` takes it."""
    texts = [prompt(tokenizer, pixels, question) for pixels, question in asked]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    shown = [patches(pixels[None]) for pixels, _ in asked]
    tiles = {name: torch.cat([one[name] for one in shown]) for name in shown[0]}
    out = model.generate(**inputs, **tiles, max_new_tokens=32, do_sample=False)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--picture", type=Path, help="a file; without it a picture is drawn")
    parser.add_argument("--question", help="without it the questions about a drawn picture, or for a description")
    parser.add_argument("--seed", type=int, default=3, help="of the picture that is drawn")
    args = parser.parse_args()

    known: dict[str, str] = {}  # questions whose answers the drawer knows
    if args.picture is None:
        picture, rng = next(drawings(args.seed))
        pixels, known = picture.pixels(), dict(questions(rng, picture, 4))
    else:
        pixels = fit(read(args.picture))
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    asked = [args.question] if args.question else [*known] or ["Describe the picture."]
    if sys.stdout.isatty():
        print(show(pixels))
    for question, said in zip(asked, answers(model, tokenizer, [(pixels, one) for one in asked]), strict=True):
        right = known.get(question, said)
        print(f"{question} {said}" + ("" if said == right else f" (wrong: {right})"))


if __name__ == "__main__":
    main()
