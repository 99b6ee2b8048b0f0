"""optimum-lfm2, as its users call it: `ORTModelForCausalLM.generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks.systems import base


def prepare(checkpoint: Path, folder: Path, variant: str) -> None:
    """Export the checkpoint.

    Args:
        variant: fp32 or one of the export's; after it may come `-kv8`, for a KV cache in 8 bits, `-b32`, for linear
            layers in blocks of 32 as other systems have, or `-columns`, for a graph that gives the columns of states.
    """
    import optimum_lfm2  # noqa: F401  before anything of optimum: transformers 5 needs it so

    # isort: split
    from optimum.exporters.onnx import main_export

    from benchmarks.bench import ROOT
    from optimum_lfm2.quality.quantize_cache import quantize_cache
    from optimum_lfm2.weights.blocks import SCHEMES

    weights, _, change = variant.partition("-")
    with patch.dict(SCHEMES):
        if change == "b32":
            SCHEMES[weights] = replace(SCHEMES[weights], linear=replace(SCHEMES[weights].linear, block_size=32))
        options = {"model_kwargs": {"rollback": "columns"}} if change == "columns" else {}
        name = "default" if weights == "fp32" else weights
        main_export(str(checkpoint), folder, do_validation=False, _variant=name, **options)
    if change == "kv8":
        quantize_cache(folder, ROOT / "demo" / "heldout.txt", chunks=4)


def file_name(variant: str) -> str:
    return "model_kv8.onnx" if variant.endswith("-kv8") else "model.onnx"


class System(base.System):
    def __init__(self, folder: Path, threads: int, length: int, variant: str) -> None:
        import optimum_lfm2  # noqa: F401  before anything of optimum: transformers 5 needs it so

        # isort: split
        from onnxruntime import SessionOptions
        from optimum.onnxruntime import ORTModelForCausalLM

        options = SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.model = ORTModelForCausalLM.from_pretrained(folder, file_name=file_name(variant), session_options=options)

    def run(self, ids: list[int], new: int) -> base.Timing:
        return base.run_generate(self.model, ids, new)

    def logits(self, ids: list[int]) -> np.ndarray:
        return base.forward_logits(self.model, ids)
