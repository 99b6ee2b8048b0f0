"""What a GGUF file says of the vectors of a text, written as sentence-transformers has it.

The file has a number for the pooling, and ColBERT's dense layer as a tensor. It has no prompts, and nothing on whether
vectors have a length of one.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from optimum_lfm2.loading.modules import MODULES
from optimum_lfm2.weights.gguf import DENSE, POOLINGS, GgufFile


IDENTITY = "torch.nn.modules.linear.Identity"


def write_modules(file: GgufFile, folder: Path) -> None:
    """Write `modules.json` and what it names into the folder that stands for a file, if it says such things."""
    pooling = file.metadata.get(f"{file.architecture}.pooling_type", 0)
    dense = DENSE in file.tensors
    if not pooling and not dense:
        return
    modules = [("", "sentence_transformers.models.Transformer")]
    if pooling:
        modules.append(("1_Pooling", "sentence_transformers.models.Pooling"))
        modes = {f"pooling_mode_{name}": number == pooling for number, name in POOLINGS.items() if number}
        width = file.metadata[f"{file.architecture}.embedding_length"]
        _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})
    if dense:  # of each token, where there is no pooling before it
        name = f"{len(modules)}_Dense"
        modules.append((name, f"{'sentence_transformers' if pooling else 'pylate'}.models.Dense"))
        weight = file.get_tensor(DENSE).contiguous()
        widths = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
        _write(folder / name / "config.json", {**widths, "bias": False, "activation_function": IDENTITY})
        save_file({"linear.weight": weight}, folder / name / "model.safetensors")
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    _write(folder / MODULES, listed)


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
