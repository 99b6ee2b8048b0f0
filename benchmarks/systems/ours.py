"""optimum-lfm2, as its users call it: `ORTModelForCausalLM.generate`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.systems import base


def prepare(checkpoint: Path, folder: Path, variant: str) -> None:
    import optimum_lfm2  # noqa: F401  before anything of optimum: transformers 5 needs it so

    # isort: split
    from optimum.exporters.onnx import main_export

    main_export(str(checkpoint), folder, do_validation=False, _variant="default" if variant == "fp32" else variant)


class System(base.System):
    def __init__(self, folder: Path, threads: int, length: int, variant: str) -> None:
        import optimum_lfm2  # noqa: F401  before anything of optimum: transformers 5 needs it so

        # isort: split
        from onnxruntime import SessionOptions
        from optimum.onnxruntime import ORTModelForCausalLM

        options = SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)

    def run(self, ids: list[int], new: int) -> base.Timing:
        return base.run_generate(self.model, ids, new)
