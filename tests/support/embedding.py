"""A tiny checkpoint with the files of sentence-transformers that LFM2.5-Embedding has, and its gold."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from checkpoints import encoder_gold, make_encoder
from transformers import AutoTokenizer

from benchmarks.checkpoint import add_tokenizer


VOCABULARY = 2048  # of the demo's tokenizer
TEXTS = ["Nora found a silver key.", "Ben put the key next to the well, and then he went home.", "Rain."]
TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
PROMPTS = {"query": "query: ", "document": "document: "}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def module(index: int, name: str, package: str = "sentence_transformers") -> dict:
    return {"idx": index, "name": str(index), "path": f"{index}_{name}", "type": f"{package}.models.{name}"}


def make_embedding(folder: Path) -> Path:
    """Save the checkpoint under `folder`."""
    path = add_tokenizer(make_encoder("encoder", folder, vocab_size=VOCABULARY))
    write(path / "modules.json", [TRANSFORMER, module(1, "Pooling"), module(2, "Normalize")])
    pooling = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    write(path / "1_Pooling" / "config.json", pooling)
    write(path / "2_Normalize" / "config.json", {})
    write(path / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    write(path / "config_sentence_transformers.json", {"prompts": PROMPTS, "default_prompt_name": None})
    return path


@torch.no_grad()
def states_alone(folder: Path, texts: list[str]) -> list[torch.Tensor]:
    """The final hidden states of each text alone, (length, hidden_size)."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), encoder_gold(folder, "feature-extraction")
    return [model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0] for text in texts]
