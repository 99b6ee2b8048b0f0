"""Generate text with an export and print it: `python demo/run.py FOLDER [PROMPT]`."""

from __future__ import annotations

import sys

import optimum_lfm2  # noqa: F401  before optimum: ORTModelForCausalLM knows LFM2 from here on


# isort: split
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer, TextStreamer


def main(folder: str, prompt: str = "Once upon a time") -> None:
    model = ORTModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=128, do_sample=False, streamer=TextStreamer(tokenizer))


if __name__ == "__main__":
    main(*sys.argv[1:3])
