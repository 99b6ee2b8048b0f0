"""Validation of models with experts: right files pass, mistakes are found, memory does not grow with the model."""

from __future__ import annotations

import subprocess
import sys

import pytest
from checkpoints import BASE, MOE
from optimum.exporters.onnx import main_export

from benchmarks.checkpoint import write_moe
from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.graph import experts as graph_experts
from optimum_lfm2.validation.decoder import errors_as_they_are
from optimum_lfm2.weights import experts


if compat.TRANSFORMERS_5:
    from transformers import Lfm2MoeConfig

pytestmark = pytest.mark.skipif(not compat.TRANSFORMERS_5, reason="transformers 4 has no lfm2_moe")


@pytest.mark.parametrize(
    "options", [{}, {"_variant": "q4"}, {"_variant": "q8"}, {"dtype": "fp16"}, {"task": "feature-extraction"}]
)
def test_validation_passes(options, checkpoint, tmp_path):
    with errors_as_they_are():
        main_export(str(checkpoint("moe")), tmp_path, **options)


@pytest.mark.parametrize("shapes", [{"batch_size": 3, "sequence_length": 5}, {"batch_size": 2, "sequence_length": 1}])
def test_validation_of_several_rows(shapes, checkpoint, tmp_path):
    with errors_as_they_are():
        main_export(str(checkpoint("moe")), tmp_path, **shapes)


def _no_epsilon(monkeypatch):
    monkeypatch.setattr(graph_experts, "NORM_EPSILON", 0.1)


def _not_interleaved(monkeypatch):
    monkeypatch.setattr(graph_experts, "interleaved", lambda weight: weight)


def _one_expert_forgotten(monkeypatch):
    real, coded = graph_experts._matrices, graph_experts._coded
    monkeypatch.setattr(graph_experts, "_matrices", lambda *args: (m * (i != 3) for i, m in enumerate(real(*args))))
    forgotten = lambda *args: ((codes, scales * (i != 3)) for i, (codes, scales) in enumerate(coded(*args)))  # noqa: E731
    monkeypatch.setattr(graph_experts, "_coded", forgotten)


def _nibbles_swapped(monkeypatch):
    monkeypatch.setattr(experts, "pack", lambda codes, blocks: codes[..., 0::2] << 4 | codes[..., 1::2])


@pytest.mark.parametrize(
    ("mistake", "variant"),
    [
        (_no_epsilon, "default"),
        (_not_interleaved, "default"),
        (_not_interleaved, "q4"),
        (_one_expert_forgotten, "default"),
        (_one_expert_forgotten, "q8"),
        (_nibbles_swapped, "q4"),
    ],
)
def test_validation_finds(mistake, variant, checkpoint, tmp_path, monkeypatch):
    mistake(monkeypatch)
    with pytest.raises(Lfm2Error, match="The file is wrong"), errors_as_they_are():
        main_export(str(checkpoint("moe")), tmp_path, _variant=variant)


MEASURE = """
import resource, sys
import optimum_lfm2
import torch
from optimum.exporters.onnx import main_export, onnx_export_from_model
torch.set_num_threads(1)
peaks = []
for source, out in zip(sys.argv[1::2], sys.argv[2::2]):
    main_export(source, out, _variant="q4")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(*peaks)
"""


def test_memory_does_not_grow_with_experts_or_layers(tmp_path):
    """An expert takes 3 MB in float32, and a layer of the larger checkpoint 96 MB. All layers are validated."""
    arguments = []
    for count, kinds in ((4, ["conv"] * 2), (32, ["conv"] * 4)):
        sizes = {
            "hidden_size": 512,
            "moe_intermediate_size": 512,
            "num_experts": count,
            "num_hidden_layers": len(kinds),
        }
        config = Lfm2MoeConfig(**BASE | MOE | sizes | {"layer_types": kinds})
        arguments += [write_moe(tmp_path / f"{count}", config), tmp_path / f"{count}_onnx"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert large - small < 48
