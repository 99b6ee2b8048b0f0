"""What `test_processor_chats.py` needs torchvision for: `python torchvision_python.py chats_child.py CHECKPOINT`.

It prints the text that transformers' processor makes of each chat, and what the text has to be, as JSON.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from PIL import Image
from transformers import AutoProcessor

import optimum_lfm2  # noqa: F401


SIZES = {"a": (128, 96), "b": (90, 300), "c": (400, 150)}
PICTURES = {name: Image.fromarray(np.full((*size, 3), 50, np.uint8)) for name, size in SIZES.items()}
# The content of each message, from the user and the assistant in turn. A letter is a picture.
CHATS = {
    "one": [["a", "What is it?"]],
    "two in a message": [["Here is", "a", "and also", "b", "Which is wider?"]],
    "two in two messages": [["a", "What is it?"], ["A square."], ["And", "b", "?"]],
    "three": [["a", "x", "b", "y", "c", "z"]],
    "two alone": [["a", "b"]],
    "none": [["What is 3 plus 4?"]],
}
BATCHES = {
    **{name: [name] for name in CHATS if name != "none"},
    "one without": ["one", "none", "two in a message"],
    "first without": ["none", "one"],
}


def messages(chat: list[list[str]]) -> list[dict]:
    def part(text: str) -> dict:
        return {"type": "image", "image": PICTURES[text]} if text in PICTURES else {"type": "text", "text": text}

    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": [part(text) for text in content]} for i, content in enumerate(chat)]


def main() -> None:
    processor = AutoProcessor.from_pretrained(sys.argv[1])
    factor = processor.image_processor.downsample_factor
    plain = {
        name: processor.apply_chat_template(messages(chat), add_generation_prompt=True, tokenize=False)
        for name, chat in CHATS.items()
    }

    def expected(name: str, shapes: list[list[int]]) -> str:
        first, *others = plain[name].split("<image>")
        for after in others:
            rows, cols = shapes.pop(0)
            count = -(-rows // factor) * -(-cols // factor)
            first += "<|image_start|>" + "<image>" * count + "<|image_end|>" + after
        return first

    found = {}
    for thumbnail in (True, False):
        options = {"do_image_splitting": False, "use_thumbnail": thumbnail, "padding": True}
        for name, chats in BATCHES.items():
            pictures = [
                [PICTURES[text] for content in CHATS[chat] for text in content if text in PICTURES] for chat in chats
            ]
            inputs = processor(images=pictures, text=[plain[chat] for chat in chats], return_tensors="pt", **options)
            rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            said = [processor.tokenizer.decode(ids[mask.bool()]) for ids, mask in rows]
            shapes = inputs["spatial_shapes"].tolist()
            found[f"{name}, thumbnail {thumbnail}"] = [said, [expected(chat, shapes) for chat in chats], len(shapes)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
