"""LFM2 for Hugging Face Optimum: ONNX export and generation with ONNX Runtime."""

# ruff: noqa: E402, I001  the order matters

from optimum_lfm2.compat import complete_transformers, read_tokenizers_of_5


complete_transformers()  # optimum-onnx imports names that this adds

from optimum.exporters.tasks import TasksManager

import optimum.exporters.onnx.__main__  # registers Optimum's own configs, which ours then replace
from optimum_lfm2.configs import Lfm2OnnxConfig
from optimum_lfm2.export.loading import Lfm2TasksManager, is_ours
from optimum_lfm2.export.options import heeding_options
from optimum_lfm2.export.validation import validated
from optimum_lfm2.families import MEMBERS, MODEL_TYPES
from optimum_lfm2.dispatch import dispatch
from optimum_lfm2.modeling import ORTLfm2ForCausalLM


for _member in MEMBERS:
    TasksManager.create_register("onnx", overwrite_existing=True)(
        _member.export_type or _member.model_type, *_member.tasks
    )(Lfm2OnnxConfig)
optimum.exporters.onnx.__main__.TasksManager = Lfm2TasksManager
optimum.exporters.onnx.__main__.onnx_export_from_model = heeding_options(
    optimum.exporters.onnx.__main__.onnx_export_from_model
)
optimum.exporters.onnx.convert.validate_model_outputs = validated(
    optimum.exporters.onnx.convert.validate_model_outputs, Lfm2OnnxConfig
)
dispatch(MODEL_TYPES)
read_tokenizers_of_5(is_ours)

__all__ = ["Lfm2OnnxConfig", "ORTLfm2ForCausalLM"]
