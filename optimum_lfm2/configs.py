"""Optimum's description of an LFM2 export: inputs, outputs, axes, dummy inputs and the hooks of the conversion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from optimum.exporters.onnx.config import TextDecoderOnnxConfig
from optimum.utils import DEFAULT_DUMMY_SHAPES, NormalizedTextConfig
from packaging import version

from optimum_lfm2 import compat
from optimum_lfm2.caches import (
    BATCH,
    LOGITS_TO_KEEP,
    PAST,
    SEQUENCE,
    TOTAL,
    CacheTensor,
    flatten,
    head_dim,
    unflatten,
)
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export.finish import bind
from optimum_lfm2.export.model_kwargs import ExportOptions
from optimum_lfm2.export.patcher import Lfm2ModelPatcher
from optimum_lfm2.families import MEMBERS
from optimum_lfm2.genai_config import write_genai_config
from optimum_lfm2.graph import ops
from optimum_lfm2.graph.member import Member
from optimum_lfm2.metadata import ANY_PADDING, IN_PLACE
from optimum_lfm2.weights.blocks import SCHEMES, Scheme


Shapes = dict[str, tuple[int | str, ...] | None]

FULL = 16  # columns of a full cache in dummy inputs, at least
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Lfm2OnnxConfig(TextDecoderOnnxConfig):
    """Dense LFM2 models: `text-generation`, `feature-extraction`, each with and without past.

    Inputs: `input_ids`, `attention_mask`, the caches in layer order, and for text-generation `num_logits_to_keep`.
    Outputs: `logits` or `last_hidden_state`, then the present caches in the same order.
    """

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DEFAULT_ONNX_OPSET = 18
    _MODEL_PATCHER = Lfm2ModelPatcher

    VARIANTS: ClassVar[dict[str, str]] = {
        "default": "Weights in float, as --dtype says.",
        "q4": "Weights in 4 bits; with --dtype fp16 for devices that compute in half precision.",
        "q4s": "As q4, the embedding and the head in 4 bits too: smaller and faster, half as faithful.",
        "q8": "Weights in 8 bits, next to indistinguishable from float.",
    }

    DEFAULT_VARIANT = "default"
    # `patch_model_for_export` sets these: Optimum gives a configuration neither the model nor `--model-kwargs` before.
    _options = ExportOptions()
    _weights: Mapping[str, torch.Tensor] = MappingProxyType({})

    @property
    def member(self) -> Member:
        """The record of the model's member of the family."""
        return MEMBERS[self._config.model_type]

    @property
    def MIN_TRANSFORMERS_VERSION(self) -> version.Version:  # noqa: N802  Optimum's name
        return version.parse(self.member.min_transformers)

    @property
    def variant(self) -> str:
        return self._variant

    @variant.setter
    def variant(self, name: str) -> None:
        name = self.DEFAULT_VARIANT if name == "default" else name
        self.check_variant(name)
        self._variant = name
        # Optimum exports with a new config that it makes of this one's class alone: so the variant goes into the class.
        self.__class__ = _class_of_variant(self._plain_class(), name)

    @classmethod
    def _plain_class(cls) -> Any:
        """The class that a module holds, of which the variant's class is made."""
        return cls

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by the plain class and the variant, since no module holds the variant's class."""
        return _unpickled, (self._plain_class(), self.variant), self.__dict__

    @property
    def scheme(self) -> Scheme | None:
        """How the weights are quantised; None: not at all."""
        scheme = SCHEMES.get(self.variant)
        return scheme and replace(scheme, embedding=self.embedding)

    @property
    def embedding(self) -> str:
        """How a quantised graph reads the embedding."""
        return self._options.embedding

    @property
    def cache_names(self) -> str:
        """The naming convention of the caches."""
        return self._options.cache_names

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Each parameter by its name in the checkpoint. It is empty until `patch_model_for_export` has the model."""
        return self._weights

    @classmethod
    def check_variant(cls, name: str) -> None:
        """Raise `Lfm2Error`, which lists the variants, for one that is not there."""
        if name not in cls.VARIANTS:
            known = "".join(f"\n  {variant}: {description}" for variant, description in cls.VARIANTS.items())
            raise Lfm2Error(f"LFM2 has no variant {name}. It has:{known}")

    def patch_model_for_export(self, model: Any, model_kwargs: dict[str, Any] | None = None) -> Lfm2ModelPatcher:
        """Read the options and the model's weights, and return the patcher. Optimum calls this before the trace.

        Args:
            model: a model of transformers. It may be on the meta device, with a `checkpoint` that has its weights.
            model_kwargs: what `ExportOptions.read` takes. Optimum adds `logits_to_keep`.

        Raises:
            Lfm2Error: the options are wrong, or the weights cannot be quantised as the variant says.
        """
        given = {name: value for name, value in (model_kwargs or {}).items() if name != "logits_to_keep"}
        options = ExportOptions.read(given)
        if "num_logits_to_keep" in given and self.task != "text-generation":
            raise Lfm2Error(
                f"--model-kwargs: num_logits_to_keep is no input of a graph for {self.task}. Leave the option out."
            )
        self._options = options
        if self.scheme is not None:
            self.member.check_scheme(self.scheme, self._config)
        patcher = super().patch_model_for_export(model, model_kwargs)
        self._weights = patcher.weights
        return patcher

    @property
    def ATOL_FOR_VALIDATION(self) -> float:  # noqa: N802  Optimum's name
        """The largest share of its length by which a token's value may differ in a layer (see `validation.py`).

        Quantised files are compared with the values that their weights stand for, activations in float.
        """
        if self.scheme is None:
            return 1e-4 if self.float_dtype == "fp32" else 2e-2
        return max(1e-3 if self.float_dtype == "fp32" else 2e-2, self.member.tolerance(self.scheme))

    @property
    def cache_tensors(self) -> list[CacheTensor]:
        return self.member.cache_tensors(self._config, self.cache_names)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return _axes(self.input_shapes())

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return _axes(self.output_shapes())

    def input_shapes(self) -> Shapes:
        """The inputs in order, a name for each axis that varies; None: `num_logits_to_keep` takes a scalar or [1]."""
        shapes: Shapes = {
            "input_ids": (BATCH, SEQUENCE),
            "attention_mask": (BATCH, TOTAL if self.use_past_in_inputs else SEQUENCE),
        }
        if self.use_past_in_inputs:
            shapes |= {tensor.past: tensor.shape(PAST) for tensor in self.cache_tensors}
        if self.task == "text-generation":
            shapes[LOGITS_TO_KEEP] = None
        return shapes

    def output_shapes(self) -> Shapes:
        if self.task == "text-generation":
            shapes: Shapes = {"logits": (BATCH, "num_logits", self._config.vocab_size)}
        else:
            shapes = {"last_hidden_state": (BATCH, SEQUENCE, self._config.hidden_size)}
        if self.use_past:
            shapes |= {tensor.present: tensor.shape(TOTAL) for tensor in self.cache_tensors}
        return shapes

    def metadata(self) -> dict[str, str]:
        """What our runtime may rely on. Heads of other widths are padded in the graph, outside the cache's buffer."""
        in_place = head_dim(self._config) % ops.HEAD_DIM_MULTIPLE == 0
        return {ANY_PADDING: "true", IN_PLACE: str(in_place).lower()}

    def ordered_inputs(self, model: Any) -> dict[str, dict[int, str]]:
        """The inputs as declared: the forward of the patched model takes them in this order."""
        return self.inputs

    def generate_dummy_inputs(self, framework: str = "pt", **shapes: Any) -> dict[str, Any]:
        """Rows with padding on either side, on a cache that is full where onnxruntime takes it.

        `GroupQueryAttention` refuses several rows with several new tokens on a full cache. So Optimum's default shapes
        become one row of 16 tokens on a cache of 16; other shapes are kept, with an empty cache where it must be.
        """
        default = {name: DEFAULT_DUMMY_SHAPES[name] for name in ("batch_size", "sequence_length")}
        wanted = {name: shapes.get(name, value) for name, value in default.items()}
        batch, length = (1, default["sequence_length"]) if wanted == default else wanted.values()
        return self._dummy_inputs(batch, length, full=batch == 1 or length == 1)

    def validation_inputs(self, shapes: Mapping[str, int]) -> list[dict[str, Any]]:
        """The calls that validation makes: padded rows on an empty cache; on a full one a token each, and a chunk.

        Args:
            shapes: what the user asked for in place of Optimum's default: then this alone.
        """
        default = {name: DEFAULT_DUMMY_SHAPES[name] for name in ("batch_size", "sequence_length")}
        batch, length = (shapes.get(name, value) for name, value in default.items())
        if (batch, length) != tuple(default.values()):
            full = length == 1 or (batch == 1 and compat.CONTINUES_WITH_SEVERAL_TOKENS)
            return [self._dummy_inputs(batch, length, full)]
        calls = [(2, length, False), (2, 1, True), (1, length, True)]
        calls = calls if compat.CONTINUES_WITH_SEVERAL_TOKENS else calls[:2]
        return [self._dummy_inputs(*call) for call in (calls if self.use_past_in_inputs else calls[:1])]

    def _dummy_inputs(self, batch: int, length: int, full: bool) -> dict[str, Any]:
        # A row sees all but three of its columns, and transformers 4 needs as many as a convolution is wide.
        past = max(FULL, self._config.conv_L_cache + 3) if full and self.use_past_in_inputs else 0
        generator = torch.Generator().manual_seed(0)
        mask = torch.ones(batch, past + length, dtype=torch.int64)
        for row in range(batch):
            mask[row, : min(row % 2 * 2 + (past > 0), past + length - 1)] = 0  # left padding, in the cache or before it
            if length > 2 and row % 2 == 0:
                mask[row, -2:] = 0  # right padding
        inputs: dict[str, Any] = {
            "input_ids": torch.randint(0, self._config.vocab_size, (batch, length), generator=generator),
            "attention_mask": mask,
        }
        if self.use_past_in_inputs:
            inputs["past_key_values"] = self._dummy_caches(batch, past, generator)
        if self.task == "text-generation":
            inputs[LOGITS_TO_KEEP] = torch.tensor(0)
        return inputs

    def _dummy_caches(self, batch: int, past: int, generator: torch.Generator) -> list[tuple[torch.Tensor, ...]]:
        def values(tensor: CacheTensor) -> torch.Tensor:
            values = torch.randn((batch, *map(int, tensor.shape(past)[1:])), generator=generator)
            return (values if past else values * 0).to(DTYPES[self.float_dtype])

        return unflatten([values(tensor) for tensor in self.cache_tensors], self.cache_tensors)

    def flatten_output_collection_property(self, name: str, field: Iterable[Any]) -> dict[str, Any]:
        if name not in ("past_key_values", "present"):
            return super().flatten_output_collection_property(name, field)
        names = [tensor.past if name == "past_key_values" else tensor.present for tensor in self.cache_tensors]
        return dict(zip(names, flatten(field), strict=True))

    def fix_dynamic_axes(
        self, model_path: Path, device: str = "cpu", dtype: str | None = None, input_shapes: dict | None = None
    ) -> None:
        """Optimum calls this right after the trace: declare the shapes and stream the weights into the file."""
        shapes = {**self.input_shapes(), **self.output_shapes()}
        logits_default = self._options.num_logits_to_keep == "optional"
        bind(model_path, self.weights, shapes, self.metadata(), self.scheme, logits_default, self.member.passes)

    def post_process_exported_models(self, path: Path, models_and_onnx_configs: dict, onnx_files_subpaths: list[str]):
        """Tied weights are one tensor already; what Optimum has saved beside the model becomes readable for all."""
        compat.spell_tokenizer_for_both(Path(path))
        compat.repeat_chat_template(Path(path))
        ((_, config),) = models_and_onnx_configs.values()  # the one that was exported, and knows --model-kwargs
        if config.task == "text-generation" and config.use_past:
            write_genai_config(Path(path), onnx_files_subpaths[0], config._config, config.cache_tensors)
        return models_and_onnx_configs, onnx_files_subpaths


@cache
def _class_of_variant(plain: Any, name: str) -> Any:
    own = {"DEFAULT_VARIANT": name, "_plain_class": classmethod(lambda cls: plain), "__module__": plain.__module__}
    return type(plain.__name__, (plain,), own)


def _unpickled(plain: Any, name: str) -> Lfm2OnnxConfig:
    of_variant = _class_of_variant(plain, name)
    return of_variant.__new__(of_variant)


def _axes(shapes: Shapes) -> dict[str, dict[int, str]]:
    """Only the axes that vary, as Optimum and torch want them."""
    return {
        name: {i: axis for i, axis in enumerate(shape or ()) if isinstance(axis, str)} for name, shape in shapes.items()
    }
