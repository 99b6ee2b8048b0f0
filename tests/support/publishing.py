"""Helpers for the tests of `optimum-cli export lfm2`: they run it and read what it wrote."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

import onnx_ir as ir
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

from optimum.commands.lfm2.export_lfm2 import ExportLfm2Command
from optimum_lfm2.publish.precisions import PRECISIONS


DEMO = Path(__file__).parents[2] / "demo"
TRAINED = DEMO / "checkpoint"
TEXT = ["--text", DEMO / "heldout.txt", "--chunks", 2, "--length", 128]
CHAT = [{"role": "user", "content": "What is 3 plus 4?"}]
STORY = "Once upon a time there was a girl named Nora"


def run(*arguments: object) -> int:
    """Run `optimum-cli export lfm2` in this process and return its exit code."""
    parser = ArgumentParser()
    ExportLfm2Command.parse_args(parser)
    command = object.__new__(ExportLfm2Command)
    command.args = parser.parse_args(list(map(str, arguments)))
    try:
        command.run()
    except SystemExit as end:
        return end.code
    return 0


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def js_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["transformers.js_config"]


def genai_weights(folder: Path) -> set[str]:
    """Return the data files of the graph that onnxruntime-genai runs."""
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    tensors = [value.const_value for value in ir.load(folder / decoder["filename"]).graph.initializers.values()]
    return {tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def rows(folder: Path) -> dict[str, list[str]]:
    """Return the rows of the card's table, by precision."""
    table = [line.strip("| ").split(" | ") for line in (folder / "README.md").read_text().splitlines() if "|" in line]
    return {cells[0]: cells for cells in table if cells[0] in PRECISIONS}


def story() -> torch.Tensor:
    return AutoTokenizer.from_pretrained(TRAINED)(STORY, return_tensors="pt").input_ids


def answer(folder: Path, **options: str) -> str:
    model = ORTModelForCausalLM.from_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
