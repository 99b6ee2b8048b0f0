"""LFM2 for Hugging Face Optimum: ONNX export and generation with ONNX Runtime."""

# ruff: noqa: E402, I001  the order matters

from optimum_lfm2.compat import complete_transformers, mend_pictures_in_text, read_tokenizers_of_5


complete_transformers()  # optimum-onnx imports names that this adds

import optimum.exporters.onnx.__main__  # registers Optimum's own configs, which ours then replace
from optimum_lfm2.configs import Lfm2OnnxConfig
from optimum_lfm2.vision_configs import Lfm2VlOnnxConfig, in_parts
from optimum_lfm2.loading.source import is_ours
from optimum_lfm2.loading.tasks_manager import Lfm2AutoConfig, Lfm2TasksManager
from optimum_lfm2.export.options import heeding_options
from optimum_lfm2.validation.decoder import validated
from optimum_lfm2.families import CLAIMED
from optimum_lfm2.dispatch import dispatch
from optimum_lfm2.modeling import ORTLfm2ForCausalLM
from optimum_lfm2.vision_modeling import ORTLfm2VlForConditionalGeneration, ORTLfm3VlForConditionalGeneration
from optimum_lfm2.registration import claim, register_members


register_members()
optimum.exporters.onnx.__main__.TasksManager = Lfm2TasksManager
optimum.exporters.onnx.__main__.AutoConfig = Lfm2AutoConfig
optimum.exporters.onnx.__main__.onnx_export_from_model = heeding_options(
    optimum.exporters.onnx.__main__.onnx_export_from_model
)
optimum.exporters.onnx.convert.validate_model_outputs = validated(
    optimum.exporters.onnx.convert.validate_model_outputs, Lfm2OnnxConfig
)
optimum.exporters.onnx.convert._get_submodels_and_onnx_configs = in_parts(
    optimum.exporters.onnx.convert._get_submodels_and_onnx_configs
)
dispatch(CLAIMED)
read_tokenizers_of_5(is_ours)
mend_pictures_in_text()

__version__ = "0.1.0"
__all__ = [
    "Lfm2OnnxConfig",
    "Lfm2VlOnnxConfig",
    "ORTLfm2ForCausalLM",
    "ORTLfm2VlForConditionalGeneration",
    "ORTLfm3VlForConditionalGeneration",
    "claim",
]
