"""optimum-lfm2 as its users call it, through `ORTModelForCausalLM.generate`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.systems import base


def prepare(checkpoint: Path, folder: Path, variant: str) -> None:
    """Export the checkpoint. `variant` is fp32 or a variant of the export; the suffix -kv8 quantises the cache too."""
    import optimum_lfm2  # noqa: F401  before anything of optimum: transformers 5 needs it so

    # isort: split
    from optimum.exporters.onnx import main_export

    from benchmarks.bench import ROOT
    from optimum_lfm2.quality.quantize_cache import quantize_cache

    weights, _, cache = variant.partition("-")
    main_export(str(checkpoint), folder, do_validation=False, _variant="default" if weights == "fp32" else weights)
    if cache:
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
