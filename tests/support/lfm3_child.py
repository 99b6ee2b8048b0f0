"""What `test_lfm3_vl.py` needs torchvision for: `python torchvision_python.py lfm3_child.py EXPORT [serve]`.

It writes to the current folder `inputs.pt`, what transformers' processor makes of chats with pictures and a video, and
`said.json`, the answers to one picture: of the pipeline, of the chat in the terminal, and of a server.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from picture_chats_child import chat, picture
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.utils.logging import set_verbosity_error

from optimum_lfm2 import ORTLfm3VlForConditionalGeneration


SIZES = {"wide": (20, 52), "tall": (70, 9)}
QUESTION, NEW = "What is it?", 12


def served(export: Path) -> str:
    """What a server answers to the first picture, which comes as data."""
    from servers import ask, openai, serving

    from optimum_lfm2.serving.folder import load_folder

    content = [picture(Path("wide.png").read_bytes()), {"type": "text", "text": QUESTION}]
    with serving(load_folder(export)) as (address, *_):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        answer = ask(client, [{"role": "user", "content": content}], max_tokens=NEW, temperature=0)
    return answer.choices[0].message.content


def main(export: Path, *further: str) -> None:
    draw = np.random.default_rng(3)
    for name, size in SIZES.items():
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(f"{name}.png")
    film = torch.from_numpy(draw.integers(0, 256, (6, 3, 24, 32), dtype=np.uint8))
    processor = AutoProcessor.from_pretrained(export)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    question = {"type": "text", "text": QUESTION}
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
    turns = [{"role": "user", "content": chats["one"]}]
    (piped,) = describe(text=turns, max_new_tokens=NEW, do_sample=False, return_full_text=False)
    said = {"pipeline": piped["generated_text"]}
    said["chat"] = chat(str(export), str(NEW), "/picture wide.png", QUESTION)
    if further:
        said["serve"] = served(export)
    Path("said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    set_verbosity_error()
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
