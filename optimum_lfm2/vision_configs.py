"""What Optimum asks of the export of LFM2-VL: one file for each part of the model.

`vision_encoder` makes features of pictures, `embed_tokens` embeddings of token ids, and `decoder_model_merged` takes
both as `inputs_embeds`. Names, inputs and outputs are those that Transformers.js reads (4.3.2). Pixels, features and
embeddings are float32 in every precision.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_lfm2.caches import BATCH, SEQUENCE
from optimum_lfm2.configs import Lfm2OnnxConfig, Shapes
from optimum_lfm2.export.finish import bind
from optimum_lfm2.export.model_kwargs import ExportOptions
from optimum_lfm2.export.patcher import DecoderPatcher, EmbeddingPatcher, GraphPatcher, VisionPatcher
from optimum_lfm2.file_names import DECODER, EMBEDDING, ONNX_FOLDER, VISION
from optimum_lfm2.loading.models import weightless
from optimum_lfm2.sidecars.folder import write_sidecars
from optimum_lfm2.sidecars.genai_config import write_genai_config
from optimum_lfm2.sidecars.js_config import declare_external_data
from optimum_lfm2.validation.vision import validate_embedding, validate_vision
from optimum_lfm2.weights.blocks import SCHEMES, VISION_SCHEME, Scheme
from optimum_lfm2.weights.checkpoint import stored_tensors


class DecoderOnnxConfig(Lfm2OnnxConfig):
    """The decoder with its head and its caches, entered with `inputs_embeds`."""

    _MODEL_PATCHER = DecoderPatcher
    TOKENS = "inputs_embeds"

    def token_shape(self) -> tuple[int | str, ...]:
        return BATCH, SEQUENCE, self._config.hidden_size

    def _dummy_tokens(self, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(batch, length, self._config.hidden_size, generator=generator) * 0.1


class _PartOnnxConfig(Lfm2OnnxConfig):
    """A part without caches."""

    def patch_model_for_export(self, model: Any, model_kwargs: dict[str, Any] | None = None) -> GraphPatcher:
        given = {name: value for name, value in (model_kwargs or {}).items() if name != "logits_to_keep"}
        self._options = ExportOptions.read(given, self.variant in SCHEMES)
        patcher = self._MODEL_PATCHER(self, model, model_kwargs)
        self._weights = patcher.weights
        return patcher

    def fix_dynamic_axes(
        self, model_path: Path, device: str = "cpu", dtype: str | None = None, input_shapes: dict | None = None
    ) -> None:
        bind(model_path, self.weights, {**self.input_shapes(), **self.output_shapes()}, {}, self.scheme)


class EmbeddingOnnxConfig(_PartOnnxConfig):
    """The decoder's embedding: ids in, `inputs_embeds` out."""

    _MODEL_PATCHER = EmbeddingPatcher
    COMPARISON = "compared with the values that its weights stand for, on random tokens"

    def input_shapes(self) -> Shapes:
        return {"input_ids": (BATCH, SEQUENCE)}

    def output_shapes(self) -> Shapes:
        return {"inputs_embeds": (BATCH, SEQUENCE, self._config.hidden_size)}

    def generate_dummy_inputs(self, framework: str = "pt", **shapes: Any) -> dict[str, Any]:
        return {"input_ids": torch.arange(6).reshape(2, 3)}

    def validate(
        self, model: Any, path: Path, atol: float | None = None, shapes: Mapping[str, int] | None = None
    ) -> dict[str, float]:
        return validate_embedding(self, model, path, self.ATOL_FOR_VALIDATION if atol is None else atol)


class VisionOnnxConfig(_PartOnnxConfig):
    """The vision tower and the projector: pictures in, `image_features` out.

    Inputs: those of the member's tower (`Tower.inputs`). Output: `image_features`, float32 (picture tokens,
    hidden_size).
    """

    _MODEL_PATCHER = VisionPatcher
    COMPARISON = (
        "run as a whole on pictures of random pixels of five sizes, and compared with transformers, which computes "
        "with the values that the file's weights stand for: the largest difference for a picture token, as a share of "
        "its length"
    )

    @property
    def scheme(self) -> Scheme | None:
        return None if super().scheme is None else VISION_SCHEME

    def input_shapes(self) -> Shapes:
        return dict(self.member.tower.inputs(self._config))

    def output_shapes(self) -> Shapes:
        return {"image_features": ("num_image_tokens", self._config.text_config.hidden_size)}

    def generate_dummy_inputs(self, framework: str = "pt", **shapes: Any) -> dict[str, Any]:
        return self.member.tower.sample(self._config, [(2, 1), (1, 3)])

    def validate(
        self, model: Any, path: Path, atol: float | None = None, shapes: Mapping[str, int] | None = None
    ) -> dict[str, float]:
        return validate_vision(self, model, path, self.ATOL_FOR_VALIDATION if atol is None else atol)


class Lfm2VlOnnxConfig(Lfm2OnnxConfig):
    """The configuration of a whole model. Optimum exports each of its `parts`."""

    def parts(self, model: PreTrainedModel) -> dict[str, tuple[PreTrainedModel, Lfm2OnnxConfig]]:
        text = text_model(model)
        with_caches = {"task": "text-generation", "use_past": True, "use_past_in_inputs": True}
        parts: dict[str, tuple[PreTrainedModel, Lfm2OnnxConfig]] = {
            VISION: (model, VisionOnnxConfig(model.config, float_dtype=self.float_dtype)),
            EMBEDDING: (text, EmbeddingOnnxConfig(text.config, float_dtype=self.float_dtype)),
            DECODER: (text, DecoderOnnxConfig(text.config, float_dtype=self.float_dtype, **with_caches)),
        }
        for _, config in parts.values():
            config.variant = self.variant
        return parts

    def post_process_exported_models(self, path: Path, models_and_onnx_configs: dict, onnx_files_subpaths: list[str]):
        """Write the files beside the graphs for every runtime."""
        folder = Path(path)
        model, _ = models_and_onnx_configs[f"{ONNX_FOLDER}/{VISION}"]
        write_sidecars(folder, getattr(model, "source", None), self.member, self.task)
        declare_external_data(folder, [folder / name for name in onnx_files_subpaths], {})
        _, decoder = models_and_onnx_configs[f"{ONNX_FOLDER}/{DECODER}"]
        text, embedding = (folder / ONNX_FOLDER / f"{part}.onnx" for part in (DECODER, EMBEDDING))
        write_genai_config(folder, ONNX_FOLDER, text, model.config, self.member, decoder.cache_tensors, embedding)
        return models_and_onnx_configs, onnx_files_subpaths


class TextWeights(Mapping[str, torch.Tensor]):
    """The decoder's weights within those of the whole model, by the names that they have in a model of text alone."""

    def __init__(self, whole: Mapping[str, torch.Tensor], names: list[str]) -> None:
        self._whole, self._names = whole, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._whole[f"model.language_{name}" if name.startswith("model.") else name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def text_model(whole: Any) -> Any:
    """Return the decoder of a whole model as a model of text alone. It has no weights in memory."""
    config = copy.deepcopy(whole.config.get_text_config())
    # transformers 4.57 asks the decoder's configuration whether head and embedding are tied, 5.24 the whole model's.
    config.tie_word_embeddings = whole.lm_head.weight is whole.get_input_embeddings().weight
    text: Any = weightless(config, "text-generation", whole.dtype)
    weights = getattr(whole, "checkpoint", stored_tensors(whole))
    text.checkpoint = TextWeights(weights, list(stored_tensors(text)))
    return text


def in_parts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Optimum's `_get_submodels_and_onnx_configs` so that LFM2-VL is exported in its parts.

    The configuration of another member reads its options, since Optimum makes dummy inputs before it hands them on.

    Optimum has such a branch for each of its own models that have parts. Every other model goes to its function with
    unchanged arguments.
    """

    @functools.wraps(original)
    def get_submodels_and_onnx_configs(*args: Any, **kwargs: Any) -> Any:
        config, models = original(*args, **kwargs)
        if isinstance(config, Lfm2VlOnnxConfig):
            ((model, _),) = models.values()
            return config, {f"{ONNX_FOLDER}/{name}": part for name, part in config.parts(model).items()}
        for model, own in models.values():
            if isinstance(own, Lfm2OnnxConfig):
                own.read_options(kwargs.get("model_kwargs"), model)
                if isinstance(config, Lfm2OnnxConfig):
                    config.know_weights(model)  # Optimum asks it for the tolerance
        return config, models

    return get_submodels_and_onnx_configs
