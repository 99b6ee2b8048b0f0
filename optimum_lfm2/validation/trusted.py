"""Compare an export with the checkpoint's own code, for a user who trusts it.

The code runs in a process of its own: some checkpoints' code changes transformers' LFM2 classes for the whole process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.loading.source import Source
from optimum_lfm2.validation.export_config import ExportConfig
from optimum_lfm2.validation.streamed import StandIns, streamed


# For each task, the classes of transformers by which `auto_map` may name the checkpoint's class.
AUTO_CLASSES = {
    "feature-extraction": ("AutoModel",),
    "fill-mask": ("AutoModelForMaskedLM", "AutoModel"),
    "token-classification": ("AutoModelForTokenClassification", "AutoModel"),
    "text-classification": ("AutoModelForSequenceClassification", "AutoModel"),
}

TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2}  # relative errors of a token; rounding adds up over the layers


def trusted_outputs(source: Source, task: str, rows: list[torch.Tensor]) -> list[np.ndarray]:
    """Run the checkpoint's own code on rows without padding, each alone, in float32.

    Args:
        source: the checkpoint.
        task: the task of the export.
        rows: the ids of each row, int64 (length).

    Returns:
        The first output for each row, float32 (length, width) or (labels).

    Raises:
        Lfm2Error: the code fails.
    """
    with TemporaryDirectory() as folder:
        results = Path(folder, "results.safetensors")
        request = {
            "model": source.name,
            "hub": {name: value for name, value in source.hub.items() if name != "force_download"},
            "classes": AUTO_CLASSES[task],
            "rows": [row.tolist() for row in rows],
            "results": str(results),
        }
        command = [sys.executable, str(Path(__file__).with_name("run_trusted.py"))]
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise Lfm2Error(f"The code of {source.name} fails: {said[:300]} Export without --trust-remote-code.")
        found = load_file(results)
    return [found[str(index)] for index in range(len(rows))]


def compare_trusted(config: ExportConfig, model: Any, source: Source, calls: Sequence[Mapping[str, Any]]) -> float:
    """Compare the reference of validation with the checkpoint's own code, on each row alone.

    The file of any precision is compared with the reference. So only the reference is compared with the code.

    Args:
        config: the `OnnxConfig` of the export. It has the weights.
        model: the reference. Its own weights are not read.
        source: the checkpoint.
        calls: inputs with `input_ids` and `attention_mask`, int64 (batch_size, sequence_length).

    Returns:
        The relative error of the worst token, or row.

    Raises:
        Lfm2Error: the code fails, or computes something else.
    """
    rows = [
        ids[mask.bool()] for call in calls for ids, mask in zip(call["input_ids"], call["attention_mask"], strict=True)
    ]
    with torch.no_grad(), streamed(model, StandIns(model, config.weights, scheme=None)):
        own = [model(row[None])[0][0].float() for row in rows]
    most, worst = TOLERANCES[config.float_dtype], 0.0
    for values, gold in zip(own, trusted_outputs(source, config.task, rows), strict=True):
        right = torch.from_numpy(gold)
        if values.shape != right.shape:
            raise Lfm2Error(
                f"The file was not kept: its output has the shape {tuple(values.shape)} for a text, and that of the "
                f"code of {source.name} has {tuple(right.shape)}."
            )
        length = right.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        worst = max(worst, float(((values - right).norm(dim=-1) / length).max()))
    if not worst <= most:
        raise Lfm2Error(
            f"The file was not kept: what is known here of {source.name} differs from its own code by {worst:.2g} of a "
            f"token's length, where {most:.2g} is allowed. Report it with the checkpoint's name."
        )
    return worst
