"""What the tests with other clients share: a folder as on the Hub, and the gold for it."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from clients import PRECISIONS, PlainModel


@pytest.fixture(scope="session")
def hub_folder(exported, tmp_path_factory) -> Path:
    """Exports of the trained checkpoint in every precision, laid out as Transformers.js asks. Never write to it."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    lay_out({name: exported("trained", **precision.export) for name, precision in PRECISIONS.items()}, folder)
    return folder


def lay_out(exports: dict[str, Path], folder: Path) -> None:
    """Graphs under `onnx/`, named by their precision, weights beside them; the rest of the first export around."""
    first = next(iter(exports.values()))
    shutil.copytree(first, folder, ignore=shutil.ignore_patterns("*.onnx*"))
    (folder / "onnx").mkdir()
    names = []
    for precision, export in exports.items():
        names.append(f"model{PRECISIONS[precision].suffix}.onnx")
        graph = onnx.load(export / "model.onnx", load_external_data=False)
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                entry.value = f"{names[-1]}_data" if entry.key == "location" else entry.value
        onnx.save(graph, folder / "onnx" / names[-1])
        (folder / "onnx" / f"{names[-1]}_data").hardlink_to(export / "model.onnx_data")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["transformers.js_config"] = {"use_external_data_format": dict.fromkeys(names, True)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="session")
def plain():
    """`plain(path)`: a file in a loop that knows nothing, on onnxruntime for Python."""
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
