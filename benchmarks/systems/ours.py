"""optimum-lfm2, as its users call it: `ORTModelForCausalLM.generate`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.systems import base


def prepare(checkpoint: Path, folder: Path, variant: str) -> None:
    from optimum.exporters.onnx import main_export

    import optimum_lfm2  # noqa: F401  registers LFM2, before anything of optimum

    main_export(str(checkpoint), folder, do_validation=False, _variant="default" if variant == "fp32" else variant)


class System(base.System):
    def __init__(self, folder: Path, threads: int, length: int, variant: str) -> None:
        from onnxruntime import SessionOptions
        from optimum.onnxruntime import ORTModelForCausalLM

        import optimum_lfm2  # noqa: F401

        options = SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)

    def run(self, ids: list[int], new: int) -> base.Timing:
        return base.run_generate(self.model, ids, new)
