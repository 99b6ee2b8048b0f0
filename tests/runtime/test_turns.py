"""One row without padding, in every way that a caller can go on: hundreds of cases for each model."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import CHECKPOINTS, changed_copy
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoModelForCausalLM
from turns import texts, turns


# The checkpoint, the options of its export, and whether io-binding is used.
MODELS = {
    "hybrid": ("hybrid", {}, True),
    "columns": ("hybrid", {"model_kwargs": {"rollback": "columns"}}, True),
    "copies": ("conv_width_2", {}, False),
    "wide": ("conv_width_7", {}, True),
    **({"lfm3": ("lfm3", {}, True)} if "lfm3" in CHECKPOINTS else {}),
}


def peak(tensors: dict) -> None:
    """Make attention peaky, so that a wrong position is seen."""
    for name in tensors:
        if name.endswith("q_layernorm.weight"):
            tensors[name] *= 5


@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_go_on(name, checkpoint, made_once, record_property):
    source, options, io_binding = MODELS[name]

    def make(folder: Path) -> None:
        main_export(
            str(changed_copy(checkpoint(source), folder, peak)), folder / "export", do_validation=False, **options
        )

    folder = made_once(f"turns-{name}", make)
    model = ORTModelForCausalLM.from_pretrained(folder / "export", use_io_binding=io_binding)
    gold = AutoModelForCausalLM.from_pretrained(folder / "changed").eval()
    cases = [turn for pair in texts(seed=len(name), count=2) for turn in turns(model, gold, *pair)]
    record_property("cases", len(cases))
    assert len(cases) > 150
    faults = [fault for turn in cases if (fault := turn.fault()) is not None]
    assert not faults, "\n".join([f"{len(faults)} of {len(cases)}", *faults[:8]])
