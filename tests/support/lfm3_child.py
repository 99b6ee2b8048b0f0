"""What `test_lfm3_vl.py` needs torchvision for: `python torchvision_python.py lfm3_child.py EXPORT`.

It writes to the current folder `inputs.pt`, what transformers' processor makes of chats with pictures and a video, and
`said.json`, the answer of the pipeline.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.utils.logging import set_verbosity_error

from optimum_lfm2 import ORTLfm3VlForConditionalGeneration


SIZES = {"wide": (20, 52), "tall": (70, 9)}


def main(export: Path) -> None:
    draw = np.random.default_rng(3)
    for name, size in SIZES.items():
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(f"{name}.png")
    film = torch.from_numpy(draw.integers(0, 256, (6, 3, 24, 32), dtype=np.uint8))
    processor = AutoProcessor.from_pretrained(export)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    question = {"type": "text", "text": "What is it?"}
    shown = [{"type": "image", "path": f"{name}.png"} for name in SIZES]
    chats = {"pictures": [*shown, question], "one": [shown[0], question]}
    inputs = {
        name: dict(processor.apply_chat_template([{"role": "user", "content": content}], **options))
        for name, content in chats.items()
    }
    text = "<|startoftext|><|image_pad|> and <|video_pad|>"
    picture = Image.open("tall.png")
    inputs["video"] = dict(
        processor(text=[text], images=[picture], videos=[film], do_sample_frames=False, return_tensors="pt")
    )
    torch.save(inputs, "inputs.pt")
    model = ORTLfm3VlForConditionalGeneration.from_pretrained(export)
    describe = pipeline("image-text-to-text", model=model, processor=processor)
    chat = [{"role": "user", "content": chats["one"]}]
    said = describe(text=chat, max_new_tokens=12, do_sample=False, return_full_text=False)
    Path("said.json").write_text(json.dumps({"pipeline": said[0]["generated_text"]}))


if __name__ == "__main__":
    set_verbosity_error()
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
