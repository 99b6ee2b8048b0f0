"""What the tests with other clients share: a folder as on the Hub, and the gold for it."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from clients import NEW, PRECISIONS, PROMPTS, PlainModel
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def hub_folder(exported, tmp_path_factory) -> Path:
    """Exports of the trained checkpoint in every precision, laid out as Transformers.js asks. Never write to it.

    Browsers lack the operator for a quantised embedding, so it is in float.
    """
    folder = tmp_path_factory.mktemp("hub") / "model"
    exports = {}
    for name, precision in PRECISIONS.items():
        embedding = {"float_embedding": True} if "_variant" in precision.export else {}
        exports[name] = exported("trained", **precision.export, **embedding)
    lay_out(exports, folder)
    return folder


def lay_out(exports: dict[str, Path], folder: Path) -> None:
    """Graphs under `onnx/`, named by their precision, weights beside them; the rest of the first export around."""
    first = next(iter(exports.values()))
    shutil.copytree(first, folder, ignore=shutil.ignore_patterns("*.onnx*"))
    (folder / "onnx").mkdir()
    names = []
    for precision, export in exports.items():
        names.append(Path(PRECISIONS[precision].file).name)
        graph = onnx.load(export / "model.onnx", load_external_data=False)
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                entry.value = f"{names[-1]}_data" if entry.key == "location" else entry.value
        onnx.save(graph, folder / "onnx" / names[-1])
        shutil.copy(export / "model.onnx_data", folder / "onnx" / f"{names[-1]}_data")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["transformers.js_config"] = {"use_external_data_format": dict.fromkeys(names, True)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="session")
def plain():
    """`plain(path, exact=False)`: the `PlainModel` of a file."""
    return cache(PlainModel)


@pytest.fixture(scope="session")
def gold_continuation(gold_model):
    """`gold_continuation(ids, count)`: what transformers alone puts after one unpadded row, greedily, past any end."""
    model = gold_model("trained").float()

    @torch.no_grad()
    def gold_continuation(ids: list[int], count: int) -> list[int]:
        inputs = torch.tensor([ids])
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[0, len(ids) :].tolist()

    return gold_continuation


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint("trained"))


@pytest.fixture(scope="session")
def prompt_ids(tokenizer):
    texts = [
        p if isinstance(p, str) else tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False)
        for p in PROMPTS
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.fixture(scope="session")
def long_ids(prompt_ids, gold_continuation):
    """A text to compare logits on."""
    return prompt_ids[2] + gold_continuation(prompt_ids[2], NEW)
