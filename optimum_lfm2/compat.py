"""What differs between transformers releases; each entry says at which release it can go.

Imported before anything of `optimum`: it imports nothing of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Lfm2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING, get_tokenizer_config

from optimum_lfm2.caches import CONV
from optimum_lfm2.errors import Lfm2Error


Caches = Sequence[tuple[torch.Tensor, ...]]

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
# transformers' name for the cache that a forward takes and gives: another from 5.24 on. Goes with the releases before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# Whether a cache of transformers can go on with several tokens at once; 4.57 takes one. Goes with transformers 4.
CONTINUES_WITH_SEVERAL_TOKENS = TRANSFORMERS_5
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_CLASS_OF_5 = "TokenizersBackend"
CHAT_TEMPLATE = "chat_template.jinja"
# What `AutoTokenizer.from_pretrained` takes and a tokenizer's own does not.
AUTO_ARGUMENTS = ("config", "use_fast", "tokenizer_type", "trust_remote_code")


def complete_transformers() -> None:
    """Put back the names that optimum-onnx imports and transformers 5 moved, and the classes that transformers 4 lacks.

    The former go with the first optimum-onnx that admits transformers 5, the latter with transformers 4.
    """
    for name, stand_in in STAND_INS.items():
        AutoConfig.register(name, stand_in, exist_ok=True)
    if not TRANSFORMERS_5:
        for name in ("lfm2", *LATER_MODELS):  # of folders that name no class
            if (config := CONFIG_MAPPING[name]) not in TOKENIZER_MAPPING:
                AutoTokenizer.register(config, fast_tokenizer_class=PreTrainedTokenizerFast)
        return
    import huggingface_hub
    from transformers import modeling_utils, pipelines, utils
    from transformers.utils import generic, output_capturing  # type: ignore[attr-defined]

    # transformers.processing_utils, which pipelines imports, puts a new module in the place of `transformers`
    # (direct_transformers_import in 5.24). So the names that it lacks are given to the one that is there now.
    transformers = sys.modules["transformers"]
    _put_back(modeling_utils, "get_parameter_dtype", lambda model: model.dtype)
    _put_back(transformers, "AutoModelForVision2Seq", transformers.AutoModelForImageTextToText)
    _put_back(utils, "is_offline_mode", huggingface_hub.is_offline_mode)
    _put_back(generic, "OutputRecorder", output_capturing.OutputRecorder)
    # Optimum looks classes up by str(class) in it: a registry of its own is as good, for it falls back to the class.
    _put_back(generic, "_CAN_RECORD_REGISTRY", {})
    # What it asks for no longer exists: generation parameters in a model's config.
    _put_back(PretrainedConfig, "_get_non_default_generation_parameters", lambda config: {})
    _route_pipelines(pipelines)


# The types that a release does not know, and the first that knows each. Goes with the last of these.
LATER_MODELS = {"lfm2_moe": "5.0", "lfm3": "5.23"}


def _stand_in(name: str) -> type[PretrainedConfig]:
    """A config for a model that this transformers lacks: an exported one asks for no more than its config."""
    return type("StandInConfig", (Lfm2Config,), {"model_type": name, "__module__": __name__})


STAND_INS = {name: _stand_in(name) for name in LATER_MODELS if name not in CONFIG_MAPPING}


def check_model_type(model_type: str) -> None:
    """Raise `Lfm2Error` where this transformers has no model of a type that we export."""
    if model_type in STAND_INS:
        raise Lfm2Error(
            f"{model_type} is a model of transformers {LATER_MODELS[model_type]}, and {transformers.__version__} is "
            'installed. Install transformers 5 as README.md tells under "Use it"; what it exports runs here too.'
        )


def _put_back(module: Any, name: str, value: Any) -> None:
    if not hasattr(module, name):
        setattr(module, name, value)


def _route_pipelines(pipelines: Any) -> None:
    """Optimum's `pipeline` replaces `infer_framework_load_model` while it runs; transformers 5 calls `load_model`."""
    if hasattr(pipelines, "infer_framework_load_model"):
        return
    load_model = pipelines.load_model
    pipelines.infer_framework_load_model = None

    def routed(*args: Any, **kwargs: Any) -> Any:
        replacement = pipelines.infer_framework_load_model
        if replacement is None:
            return load_model(*args, **kwargs)
        for name in ("code_revision", "dtype"):  # which Optimum's models do not take
            kwargs.pop(name, None)
        return replacement(*args, **kwargs)[1]

    pipelines.load_model = routed


def spell_rope_for_both(config: PretrainedConfig) -> None:
    """Let `config` say the rope's parameters as transformers 4 reads them, at the top, and as 5 does, nested.

    transformers 4 silently takes its default where it finds them nested. Goes with transformers 4.
    """
    rope = getattr(config, "rope_parameters", None)
    if rope is None or any(isinstance(value, dict) for value in rope.values()):  # of each kind: 4 has no such model
        return
    config.rope_theta = rope.get("rope_theta", getattr(config, "rope_theta", None))
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    if not TRANSFORMERS_5 and scaling.get("rope_type", "default") != "default":
        config.rope_scaling = scaling


def read_tokenizers_of_5(is_ours: Callable[..., bool]) -> None:
    """Let `AutoTokenizer` of transformers 4 read the folders of our models that transformers 5 wrote. Goes with 4.

    Those name the class `TokenizersBackend`. For every other model the answer and the error are transformers' own.

    Args:
        is_ours: told a folder or an id of the Hub, and the arguments of `from_pretrained`.
    """
    if TRANSFORMERS_5:
        return
    original = AutoTokenizer.from_pretrained

    @wraps(original)
    def from_pretrained(pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        try:
            return original(pretrained_model_name_or_path, *inputs, **kwargs)
        except ValueError:  # what it raises for a class that it does not know
            written = _tokenizer_of_5(pretrained_model_name_or_path, kwargs)
            if written is None or not is_ours(pretrained_model_name_or_path, **kwargs):
                raise
        rest = {name: value for name, value in kwargs.items() if name not in AUTO_ARGUMENTS}
        options = {**_special_tokens(written), **rest}
        return PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, *inputs, **options)

    AutoTokenizer.from_pretrained = staticmethod(from_pretrained)  # type: ignore[assignment]


def _tokenizer_of_5(name_or_path: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The `tokenizer_config.json` if it names transformers 5's class; else None."""
    try:
        written = get_tokenizer_config(name_or_path, **kwargs)
    except Exception:  # the caller raises what transformers says
        return None
    return written if written.get("tokenizer_class") == TOKENIZER_CLASS_OF_5 else None


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """Special tokens without a name of their own: transformers 5 lists them where 4 keeps named ones."""
    extra = tokenizer_config.get("extra_special_tokens")
    return {"additional_special_tokens": extra, "extra_special_tokens": {}} if isinstance(extra, list) else {}


def spell_tokenizer_for_both(folder: Path) -> None:
    """Rewrite a `tokenizer_config.json` of transformers 5 so that 4 alone reads it too. Goes with transformers 4."""
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return
    written = json.loads(path.read_text(encoding="utf-8"))
    if written.get("tokenizer_class") != TOKENIZER_CLASS_OF_5:
        return
    _write_json(path, written | {"tokenizer_class": "PreTrainedTokenizerFast", **_special_tokens(written)})


def repeat_chat_template(folder: Path) -> None:
    """Put the template of `chat_template.jinja` into `tokenizer_config.json` too: Transformers.js looks only there.

    Goes when transformers writes both again, or Transformers.js reads the former.
    """
    path, template = folder / TOKENIZER_CONFIG, folder / CHAT_TEMPLATE
    if path.is_file() and template.is_file():
        written = json.loads(path.read_text(encoding="utf-8"))
        _write_json(path, written | {"chat_template": template.read_text(encoding="utf-8")})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


class GenerationWithoutExperts:
    """What `generate` of transformers 5 asks of a model that is no module. Goes with an optimum-onnx made for it."""

    def get_experts_implementation(self) -> dict[str, str]:
        """None: `generate` would switch to another one for decoding."""
        return {}


# The caches that transformers' own forward takes: transformers 4 has a class of LFM2's own, 5 one for every model.
# The former goes with transformers 4. Types are checked against the release that pip resolves: hence what is ignored.

if TRANSFORMERS_5:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class _HybridCache(DynamicCache):
        """transformers 5's cache, which looks for an attention layer even where a model has none."""

        length = 0

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.length

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # type: ignore[override]
            return self.length + query_length, 0

    def hybrid_cache(model: PreTrainedModel, caches: Caches | None) -> Any:
        """A cache of one row for transformers' forward in float32, with `caches` (a tuple a layer) or empty."""
        cache: Any = _HybridCache(config=model.config)
        # All keys of sliding attention, which its mask hides: a window of its own would be another thing to be right.
        cache.layers = [DynamicLayer() if getattr(layer, "is_sliding", False) else layer for layer in cache.layers]
        for layer, tensors in enumerate(caches or ()):
            update = cache.update_conv_state if len(tensors) == 1 else cache.update
            update(*(x.clone() for x in tensors), layer)
        return cache

    def hybrid_cache_layers(cache: Any) -> list[tuple[torch.Tensor, ...]]:
        """The inverse of `hybrid_cache`: one tuple of caches a layer."""
        return [
            (layer.conv_states[0],) if hasattr(layer, "conv_states") else (layer.keys, layer.values)
            for layer in cache.layers
        ]

    def call(model: PreTrainedModel, ids: torch.Tensor, cache: Any, length: int) -> torch.Tensor:
        """The first output of transformers' forward for one row's new `ids`, (1, new), on `length` cached tokens."""
        cache.length = length
        positions = torch.arange(length, length + ids.shape[1], device=ids.device)
        return model(input_ids=ids, position_ids=positions[None], use_cache=True, **{CACHE: cache})[0]

else:
    from transformers.models.lfm2.modeling_lfm2 import Lfm2HybridConvCache

    class _ConvCache(Lfm2HybridConvCache):
        """transformers 4's cache, which looks for an attention layer even where a model has none."""

        def __init__(self, model: PreTrainedModel) -> None:
            self.key_cache: list[torch.Tensor] = []
            self.value_cache: list[torch.Tensor] = []
            self.conv_cache: list[torch.Tensor] = []
            self.layer_types = model.config.layer_types
            self.length = 0

        def get_seq_length(self, layer_idx: int | None = 0) -> int:
            return self.length

    def hybrid_cache(model: PreTrainedModel, caches: Caches | None) -> Any:
        """A cache of one row for transformers' forward in float32, with `caches` (a tuple a layer) or empty."""
        config = model.config
        cache = _ConvCache(model)
        nothing, empty_state = torch.zeros(0), torch.zeros(1, config.hidden_size, config.conv_L_cache)
        for layer, layer_type in enumerate(config.layer_types):
            key, value, conv = nothing, nothing, empty_state.clone()
            if caches is not None and layer_type == CONV:
                conv = caches[layer][0].clone()
            elif caches is not None:
                key, value = (x.clone() for x in caches[layer])
            cache.key_cache.append(key)
            cache.value_cache.append(value)
            cache.conv_cache.append(conv)
        return cache

    def hybrid_cache_layers(cache: Any) -> list[tuple[torch.Tensor, ...]]:
        """The inverse of `hybrid_cache`: one tuple of caches a layer."""
        return [
            (cache.conv_cache[i],) if layer_type == CONV else (cache.key_cache[i], cache.value_cache[i])
            for i, layer_type in enumerate(cache.layer_types)
        ]

    def call(model: PreTrainedModel, ids: torch.Tensor, cache: Any, length: int) -> torch.Tensor:
        """The first output of transformers' forward for one row's new `ids`, (1, new), on `length` cached tokens."""
        cache.length = length
        positions = torch.arange(length, length + ids.shape[1], device=ids.device)
        return model(input_ids=ids, past_key_values=cache, use_cache=True, cache_position=positions)[0]
