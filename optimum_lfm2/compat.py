"""Differences between transformers releases. Each entry says when it can go.

`optimum_lfm2/__init__.py` imports this before `optimum`, so nothing here imports `optimum`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Lfm2Config,
    Lfm2VlConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING, get_tokenizer_config
from transformers.utils import CONFIG_NAME

from optimum_lfm2.errors import Lfm2Error, read_object


TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
# The name of the cache among a forward's arguments and outputs. transformers 5.24 renamed it. Goes with 5.23.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# Whether `Cache.crop` takes the number of tokens to remove. In 4.57 it takes the length to keep. Goes with 4.
CROPS_BY_NUMBER = "tokens_to_remove" in signature(Cache.crop).parameters
# Whether a forward over a filled cache takes several new tokens. In 4.57 it takes one. Goes with transformers 4.
CONTINUES_WITH_SEVERAL_TOKENS = TRANSFORMERS_5
# Whether transformers leaves a head untied that is stored with other values than the embedding. Goes with 4.
KEEPS_BOTH_HEADS = TRANSFORMERS_5
# Whether transformers' forward takes `cache_position`. Goes with transformers 4.
HEEDS_CACHE_POSITION = not TRANSFORMERS_5
# Whether `from_pretrained` reads a `quantization_config` of null. Goes with transformers 4.
READS_NULL_QUANTIZATION = TRANSFORMERS_5
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_CLASS_OF_5 = "TokenizersBackend"
CHAT_TEMPLATE = "chat_template.jinja"
# The arguments of `AutoTokenizer.from_pretrained` that a tokenizer class does not take.
AUTO_ARGUMENTS = ("config", "use_fast", "tokenizer_type", "trust_remote_code")


def complete_transformers() -> None:
    """Add the names that optimum-onnx 0.1 imports and transformers 5 moved, and the classes that transformers 4 lacks.

    The names go with the first optimum-onnx that admits transformers 5, the classes with transformers 4.
    """
    for name, stand_in in STAND_INS.items():
        AutoConfig.register(name, stand_in, exist_ok=True)
    if LFM2_VL_OF_4 not in CONFIG_MAPPING:
        CONFIG_MAPPING.register(LFM2_VL_OF_4, Lfm2VlConfig)
    if not TRANSFORMERS_5:
        for name in ("lfm2", *LATER_MODELS):  # a folder's tokenizer may name no class
            if (config := CONFIG_MAPPING[name]) not in TOKENIZER_MAPPING:
                AutoTokenizer.register(config, fast_tokenizer_class=PreTrainedTokenizerFast)
        return
    import huggingface_hub
    from transformers import modeling_utils, pipelines, utils
    from transformers.utils import generic, output_capturing  # type: ignore[attr-defined]

    # Importing `transformers.pipelines` puts a new module in the place of `transformers` in `sys.modules`
    # (`direct_transformers_import` in processing_utils, 5.24). The names must be on the new one.
    transformers = sys.modules["transformers"]
    _put_back(modeling_utils, "get_parameter_dtype", lambda model: model.dtype)
    _put_back(transformers, "AutoModelForVision2Seq", transformers.AutoModelForImageTextToText)
    _put_back(utils, "is_offline_mode", huggingface_hub.is_offline_mode)
    _put_back(generic, "OutputRecorder", output_capturing.OutputRecorder)
    # Optimum looks classes up in this registry, and falls back to the class itself. So an empty one serves.
    _put_back(generic, "_CAN_RECORD_REGISTRY", {})
    # Optimum asks for the generation parameters in a model's config. In transformers 5 a config has none.
    _put_back(PretrainedConfig, "_get_non_default_generation_parameters", lambda config: {})
    _route_pipelines(pipelines)


# Model types that some supported release lacks, and the first release that has each. Goes when all of them have all.
LATER_MODELS = {"lfm2_moe": "5.0", "lfm3": "5.23", "lfm3_vl": "5.23", "olmo_hybrid": "5.3"}


# The classes that their configurations are like where this transformers lacks them, if not `Lfm2Config`.
LIKENESSES: dict[str, type[PretrainedConfig]] = {"lfm3_vl": Lfm2VlConfig, "lfm3_vl_vision": PretrainedConfig}
# Types of configurations that are a part of others.
PARTS = {"lfm3_vl_vision": "5.23"}


def _stand_in(name: str) -> type[PretrainedConfig]:
    """Make a config class for a model that this transformers lacks. To run an export, its config is enough."""
    return type("StandInConfig", (LIKENESSES.get(name, Lfm2Config),), {"model_type": name, "__module__": __name__})


STAND_INS = {name: _stand_in(name) for name in (*LATER_MODELS, *PARTS) if name not in CONFIG_MAPPING}


# transformers 4.57 writes the type `lfm2_vl` this way, and no release up to 5.24 reads it. Goes when they do.
LFM2_VL_OF_4 = "lfm2-vl"


def picture_features(model: Any, pictures: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return transformers' features of pictures, (picture tokens, hidden_size), from the arguments of its forward."""
    features = model.get_image_features(**pictures)
    return torch.cat(features.pooler_output if TRANSFORMERS_5 else features)


def mend_pictures_in_text() -> None:
    """Mend the text that the LFM2-VL processor of transformers 4.57 makes of a chat. Goes with transformers 4.

    It repeats what stands between two pictures, empties a chat without one beside others, and makes no picture tokens
    of a picture in one tile where `use_thumbnail` is false. No other model has this processor.
    """
    if TRANSFORMERS_5:
        return
    from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor

    processor: Any = Lfm2VlProcessor
    original = processor.expand_text_with_placeholders

    @wraps(original)
    def expand_text_with_placeholders(
        self: Any,
        text: list[str],
        images: list[list[Any]],
        image_rows: list[int],
        image_cols: list[int],
        image_sizes: list[Any],
        use_image_special_tokens: bool,
        **settings: Any,
    ) -> list[str]:
        found = iter(zip(image_rows, image_cols, image_sizes, strict=True))

        def expanded(picture: Any) -> str:
            rows, cols, size = next(found)
            # The tokens of a thumbnail are also those of a picture in one tile.
            own = settings if rows > 1 or cols > 1 else settings | {"use_thumbnail": True}
            alone = ([self.image_token], [[picture]], [rows], [cols], [size])
            return original(self, *alone, use_image_special_tokens, **own)[0]

        whole = []
        for sample, pictures in zip(text, images, strict=True):
            first, *others = sample.split(self.image_token)
            whole.append(first + "".join(expanded(one) + after for one, after in zip(pictures, others, strict=True)))
        return whole

    processor.expand_text_with_placeholders = expand_text_with_placeholders


def vl_model(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Make a model of pictures and text from its configuration. `options` are those of transformers' `from_config`.

    transformers 4.57 has the projector's norm whatever `projector_use_layernorm` says.
    """
    model: Any = AutoModelForImageTextToText.from_config(config, **options)
    if not getattr(config, "projector_use_layernorm", True) and not TRANSFORMERS_5:
        model.model.multi_modal_projector.layer_norm = torch.nn.Identity()
    return model


def check_model_type(model_type: str) -> None:
    """Raise `Lfm2Error` where this transformers has no model of a type that we export."""
    if model_type in STAND_INS:
        first = (LATER_MODELS | PARTS)[model_type]
        raise Lfm2Error(
            f"{model_type} is a model of transformers {first}, and {transformers.__version__} is "
            'installed. Install transformers 5 as README.md tells under "Install"; what it exports runs here too.'
        )


def check_grouped_norm(groups: int) -> None:
    """Raise `Lfm2Error` where transformers norms all groups of Mamba-2 together. Goes with transformers 4."""
    if groups > 1 and not TRANSFORMERS_5:
        raise Lfm2Error(
            f"mamba_n_groups in config.json is {groups}: transformers {transformers.__version__} norms the groups "
            'together, which is wrong. Install transformers 5 as README.md tells under "Install"; what it exports runs '
            "here too."
        )


def check_processor(model_type: str) -> None:
    """Raise `Lfm2Error` where this transformers has no processor of pictures for a type that we run."""
    if model_type in STAND_INS:
        raise Lfm2Error(
            f"The processor of {model_type} is in transformers {LATER_MODELS[model_type]}, and "
            f'{transformers.__version__} is installed. Install transformers 5 as README.md tells under "Install".'
        )


def _put_back(module: Any, name: str, value: Any) -> None:
    if not hasattr(module, name):
        setattr(module, name, value)


def _route_pipelines(pipelines: Any) -> None:
    """Let `load_model` of transformers 5 call what Optimum's `pipeline` puts in for `infer_framework_load_model`."""
    if hasattr(pipelines, "infer_framework_load_model"):
        return
    load_model = pipelines.load_model
    pipelines.infer_framework_load_model = None

    def routed(*args: Any, **kwargs: Any) -> Any:
        replacement = pipelines.infer_framework_load_model
        if replacement is None:
            return load_model(*args, **kwargs)
        for name in ("code_revision", "dtype"):  # Optimum's models do not take these
            kwargs.pop(name, None)
        return replacement(*args, **kwargs)[1]

    pipelines.load_model = routed


def spell_rope_for_both(config: PretrainedConfig) -> None:
    """Write the parameters of the rotary embedding into `config` in the forms of both releases.

    transformers 5 nests them in `rope_parameters`. transformers 4 reads the top level, and silently takes its default
    where they are nested only. Goes with transformers 4.
    """
    rope = getattr(config, "rope_parameters", None)
    if rope is None or any(isinstance(value, dict) for value in rope.values()):  # of each kind: 4 has no such model
        return
    config.rope_theta = rope.get("rope_theta", getattr(config, "rope_theta", None))
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    if not TRANSFORMERS_5 and scaling.get("rope_type", "default") != "default":
        config.rope_scaling = scaling


def read_tokenizers_of_5(is_ours: Callable[..., bool]) -> None:
    """Let `AutoTokenizer` of transformers 4 read our models' folders that transformers 5 wrote. Goes with 4.

    Such a folder names the class `TokenizersBackend`. For every other model the result and the error are transformers'.

    Args:
        is_ours: takes a folder or an id of the Hub, and the arguments of `from_pretrained`.
    """
    if TRANSFORMERS_5:
        return
    original = AutoTokenizer.from_pretrained

    @wraps(original)
    def from_pretrained(pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        try:
            return original(pretrained_model_name_or_path, *inputs, **kwargs)
        except ValueError:  # transformers raises it for an unknown class
            written = _tokenizer_of_5(pretrained_model_name_or_path, kwargs)
            if written is None or not is_ours(pretrained_model_name_or_path, **kwargs):
                raise
        rest = {name: value for name, value in kwargs.items() if name not in AUTO_ARGUMENTS}
        options = {**_special_tokens(written), **rest}
        return PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, *inputs, **options)

    AutoTokenizer.from_pretrained = staticmethod(from_pretrained)  # type: ignore[assignment]


def _tokenizer_of_5(name_or_path: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return `tokenizer_config.json` if it names the class of transformers 5, else None."""
    try:
        written = get_tokenizer_config(name_or_path, **kwargs)
    except Exception:  # the caller raises the error of transformers
        return None
    return written if written.get("tokenizer_class") == TOKENIZER_CLASS_OF_5 else None


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """Return the unnamed special tokens as transformers 4 wants them.

    transformers 5 lists them in `extra_special_tokens`, where transformers 4 expects a dictionary of named ones.
    """
    extra = tokenizer_config.get("extra_special_tokens")
    return {"additional_special_tokens": extra, "extra_special_tokens": {}} if isinstance(extra, list) else {}


def spell_tokenizer_for_both(folder: Path) -> None:
    """Rewrite a `tokenizer_config.json` of transformers 5 so that 4 reads it without us. Goes with transformers 4."""
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return
    written = read_object(path)
    if written.get("tokenizer_class") != TOKENIZER_CLASS_OF_5:
        return
    _write_json(path, written | {"tokenizer_class": "PreTrainedTokenizerFast", **_special_tokens(written)})


def spell_model_type(folder: Path, name: str) -> None:
    """Write the model type into `config.json` as every runtime reads it. Goes with transformers 4."""
    path = folder / CONFIG_NAME
    written = read_object(path)
    if written["model_type"] != name:
        _write_json(path, written | {"model_type": name})


def spell_config(folder: Path, written: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change `config.json` to what every runtime and release reads (`Member.written`)."""
    path = folder / CONFIG_NAME
    before = json.loads(path.read_text(encoding="utf-8"))
    if (after := written(before)) != before:
        _write_json(path, after)


def repeat_chat_template(folder: Path) -> None:
    """Copy the template of `chat_template.jinja` into `tokenizer_config.json`. Transformers.js 4.3 looks only there.

    Goes when transformers writes both again, or Transformers.js reads `chat_template.jinja`.
    """
    path, template = folder / TOKENIZER_CONFIG, folder / CHAT_TEMPLATE
    if path.is_file() and template.is_file():
        written = read_object(path)
        _write_json(path, written | {"chat_template": template.read_text(encoding="utf-8")})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def name_for_pipelines(model_class: Any) -> None:
    """Let transformers' pipelines know a class of ours by name, or they log an error. Goes with optimum-onnx 0.1.

    Optimum registers each class of its own as the model of `AutoConfig`, which no model has. transformers 5 ignores
    that, since the config is its own.
    """
    if TRANSFORMERS_5:
        model_class.auto_model_class.register(AutoConfig, model_class, exist_ok=True)


class GenerationWithoutExperts:
    """Methods that `generate` of transformers 5 expects of a model. Goes with an optimum-onnx for transformers 5."""

    def get_experts_implementation(self) -> dict[str, str]:
        """Return nothing, so that `generate` does not switch implementations for decoding."""
        return {}
