"""LFM2 for Hugging Face Optimum: ONNX export and generation with ONNX Runtime."""

# ruff: noqa: E402, I001  the order matters

from optimum_lfm2.compat import complete_transformers


complete_transformers()  # before anything of optimum is imported

from optimum.exporters.tasks import TasksManager

import optimum.exporters.onnx.__main__  # Optimum's own configs first, so that ours replace them
from optimum_lfm2.configs import Lfm2MoeOnnxConfig, Lfm2OnnxConfig
from optimum_lfm2.export.loading import MODEL_TYPES, Lfm2TasksManager
from optimum_lfm2.export.options import heeding_variant
from optimum_lfm2.export.validation import validated_by_config
from optimum_lfm2.modeling import ORTLfm2ForCausalLM, dispatch


TASKS = ("text-generation", "text-generation-with-past", "feature-extraction", "feature-extraction-with-past")
for _model_type, _config in (("lfm2", Lfm2OnnxConfig), ("lfm2_moe", Lfm2MoeOnnxConfig)):
    TasksManager.create_register("onnx", overwrite_existing=True)(_model_type, *TASKS)(_config)
optimum.exporters.onnx.__main__.TasksManager = Lfm2TasksManager
optimum.exporters.onnx.__main__.onnx_export_from_model = heeding_variant(
    optimum.exporters.onnx.__main__.onnx_export_from_model
)
optimum.exporters.onnx.convert.validate_model_outputs = validated_by_config(
    optimum.exporters.onnx.convert.validate_model_outputs
)
dispatch(MODEL_TYPES)

__all__ = ["Lfm2MoeOnnxConfig", "Lfm2OnnxConfig", "ORTLfm2ForCausalLM"]
