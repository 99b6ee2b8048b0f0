"""What Optimum asks about an LFM2 export: inputs, outputs, axes, dummy inputs, and the hooks of the conversion."""

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
from optimum_lfm2.export.patcher import GraphPatcher, Lfm2ModelPatcher
from optimum_lfm2.families import member_of
from optimum_lfm2.file_names import MODEL
from optimum_lfm2.graph import ops
from optimum_lfm2.graph.member import Member
from optimum_lfm2.metadata import ANY_PADDING, IN_PLACE
from optimum_lfm2.sidecars.folder import write_sidecars
from optimum_lfm2.sidecars.genai_config import write_genai_config
from optimum_lfm2.validation.decoder import validate
from optimum_lfm2.weights.blocks import Scheme, scheme_of
from optimum_lfm2.weights.coded import keeping


Shapes = dict[str, tuple[int | str, ...] | None]

FULL = 16  # the fewest columns of a filled cache in dummy inputs
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Lfm2OnnxConfig(TextDecoderOnnxConfig):
    """The configuration of every member of the family.

    A decoder's tasks are `text-generation` and `feature-extraction`, each with past and without. An encoder's tasks are
    those of its heads; it has no past.

    Inputs: `input_ids`, `attention_mask`, the caches in layer order, and for text-generation `num_logits_to_keep`.
    Outputs: `logits` or `last_hidden_state`, then the present caches in the same order, then on request the columns
    that the call adds to states. `input_shapes` and `output_shapes` give the shapes. Ids and masks are int64, all
    else is of the dtype `float_dtype`.
    """

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DEFAULT_ONNX_OPSET = 18
    _MODEL_PATCHER: type[GraphPatcher] = Lfm2ModelPatcher

    VARIANTS: ClassVar[dict[str, str]] = {
        "default": "Weights as the checkpoint has them: in float, as --dtype says, or the codes of a GGUF file.",
        "q4": "Weights in 4 bits; with --dtype fp16 for GPUs, in smaller blocks.",
        "q4s": "As q4, the embedding and the head in 4 bits too: smaller and faster, with twice the divergence.",
        "q8": "Weights in 8 bits, next to indistinguishable from float.",
        "float": "Weights in float, also those that a GGUF file has in codes.",
    }

    # How `validate` compares a file, as a model card says it.
    COMPARISON = (
        "run layer by layer on random tokens when it was written, and each layer compared with that of transformers on "
        "the same input, with the values that the file's weights stand for, activations in float: the largest "
        "difference for a token, as a share of what the layer adds for it"
    )
    DEFAULT_VARIANT = "default"
    TOKENS = "input_ids"  # the input that says what the tokens are
    # `patch_model_for_export` sets these. Optimum gives a configuration neither the model nor `--model-kwargs` earlier.
    _options = ExportOptions()
    _weights: Mapping[str, torch.Tensor] = MappingProxyType({})

    @property
    def member(self) -> Member:
        """The record of the family member that the model belongs to."""
        member = member_of(self._config)
        if self._options.sliding_cache == "growing" and member.growing:
            return member.growing
        return member.packed if self.cache_names == "genai" and member.packed else member

    @property
    def MIN_TRANSFORMERS_VERSION(self) -> version.Version:  # noqa: N802  Optimum's name
        return version.parse(self.member.min_transformers)

    @property
    def variant(self) -> str:
        """The precision of the weights, a key of `VARIANTS`. Setting it raises `Lfm2Error` for any other name."""
        return self._variant

    @variant.setter
    def variant(self, name: str) -> None:
        name = self.DEFAULT_VARIANT if name == "default" else name
        self.check_variant(name, self.member.title)
        self._variant = name
        # Optimum exports with a new configuration, and takes nothing but the class from this one. So the class has the
        # variant too.
        self.__class__ = _class_of_variant(self._plain_class(), name)

    @classmethod
    def _plain_class(cls) -> Any:
        """Return the class that a module holds. The class of a variant is derived from it."""
        return cls

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the plain class and the variant, since no module holds the class of the variant."""
        return _unpickled, (self._plain_class(), self.variant), self.__dict__

    @property
    def scheme(self) -> Scheme | None:
        """How the weights are quantised. None means that they are not.

        The codes of a GGUF file are known once `read_options` has the model.
        """
        if self.variant == "float":
            return None
        asked = scheme_of(self.variant, self.float_dtype)
        return keeping(replace(asked, embedding=self.embedding, in_8_bits=self.member.in_8_bits), self.weights)

    @property
    def embedding(self) -> str:
        """How a quantised graph reads the embedding."""
        return self._options.embedding

    @property
    def cache_names(self) -> str:
        """The naming convention of the caches."""
        return self._options.cache_names

    @property
    def gives_columns(self) -> bool:
        """Whether the graph has outputs for the columns that a call adds to states."""
        return self.use_past and self._options.rollback == "columns"

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Each parameter by its name in the checkpoint. It is empty until `patch_model_for_export` has the model."""
        return self._weights

    @classmethod
    def check_variant(cls, name: str, title: str = "LFM2") -> None:
        """Raise `Lfm2Error` for an unknown variant. The message lists those that there are.

        Args:
            name: the variant.
            title: what to call the model (`Member.title`).
        """
        if name not in cls.VARIANTS:
            known = "".join(f"\n  {variant}: {description}" for variant, description in cls.VARIANTS.items())
            raise Lfm2Error(f"{title} has no variant {name}. It has:{known}")

    def know_weights(self, model: Any) -> None:
        """Let `scheme` keep the codes that the `checkpoint` of a model has."""
        self._weights = getattr(model, "checkpoint", {})

    def read_options(self, model_kwargs: dict[str, Any] | None, model: Any) -> None:
        """Read the options, which say what the graph's inputs are.

        Args:
            model_kwargs: what `ExportOptions.read` takes. Optimum adds `logits_to_keep`.
            model: the model. A `checkpoint` of it may have codes of its own.

        Raises:
            Lfm2Error: the options are wrong, or the weights cannot be quantised as the variant says.
        """
        given = {name: value for name, value in (model_kwargs or {}).items() if name != "logits_to_keep"}
        self.know_weights(model)
        options = ExportOptions.read(given, self.scheme is not None, self.member.options)
        if "num_logits_to_keep" in given and self.task != "text-generation":
            raise Lfm2Error(
                f"--model-kwargs: num_logits_to_keep is no input of a graph for {self.task}. Leave the option out."
            )
        if "sliding_cache" in given and member_of(self._config).growing is None:
            raise Lfm2Error(
                f"--model-kwargs: {self._config.model_type} has no sliding attention. Leave sliding_cache out."
            )
        if options.rollback == "columns" and not self.use_past:
            raise Lfm2Error(
                f"--model-kwargs: rollback takes tokens back from a cache, and a graph for {self.task} has none. "
                f"Use --task {self.task}-with-past."
            )
        if options.rollback == "columns" and (kept := self._whole_states()):
            raise Lfm2Error(
                f"--model-kwargs: rollback by columns takes tokens back from windows, and {kept[0].past} of "
                f"{self._config.model_type} is the sum of all tokens. Leave rollback out: tokens are run again."
            )
        self._options = options
        if self.scheme is not None:
            self.member.check_scheme(self.scheme, self._config)

    def patch_model_for_export(self, model: Any, model_kwargs: dict[str, Any] | None = None) -> GraphPatcher:
        """Read the options and the model's weights, and return the patcher. Optimum calls this before the trace.

        Args:
            model: a model of transformers. It may be on the meta device, with a `checkpoint` that has its weights.
            model_kwargs: what `read_options` takes, with its errors.
        """
        self.read_options(model_kwargs, model)
        patcher = super().patch_model_for_export(model, model_kwargs)
        self._weights = patcher.weights
        return patcher

    @property
    def ATOL_FOR_VALIDATION(self) -> float:  # noqa: N802  Optimum's name
        """The largest relative error of a token that validation accepts in a layer (see `validation.relative_error`).

        The reference of a quantised file computes with the dequantised weights, and both keep activations in float.
        """
        if self.scheme is None:
            return 1e-4 if self.float_dtype == "fp32" else 2e-2
        return max(1e-3 if self.float_dtype == "fp32" else 2e-2, self.member.tolerance(self.scheme))

    @property
    def cache_tensors(self) -> list[CacheTensor]:
        """The cache tensors in the order of the inputs."""
        return self.member.cache_tensors(self._config, self.cache_names)

    def _whole_states(self) -> list[CacheTensor]:
        """Return the caches of fixed size out of which no token can be taken."""
        return [cache for cache in self.cache_tensors if not cache.grows and not cache.state.gives_columns]

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """For each input, in order, the axes that vary: index to symbol."""
        return _axes(self.input_shapes())

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """For each output, in order, the axes that vary: index to symbol."""
        return _axes(self.output_shapes())

    def input_shapes(self) -> Shapes:
        """Return the shape of each input, in order. A symbol stands for an axis that varies.

        `num_logits_to_keep` has None, so that a caller may feed a scalar or a vector of one element.
        """
        shapes: Shapes = {
            self.TOKENS: self.token_shape(),
            "attention_mask": (BATCH, TOTAL if self.use_past_in_inputs else SEQUENCE),
        }
        if self.use_past_in_inputs:
            shapes |= {tensor.past: tensor.shape(PAST) for tensor in self.cache_tensors}
        if self.task == "text-generation":
            shapes[LOGITS_TO_KEEP] = None
        return shapes

    def token_shape(self) -> tuple[int | str, ...]:
        """Return the shape of the input `TOKENS`."""
        return BATCH, SEQUENCE

    def output_shapes(self) -> Shapes:
        """Return the shape of each output, in order. A symbol stands for an axis that varies."""
        if head := self.member.heads.get(self.task):
            return {head.output: (BATCH, *head.axes(self._config))}
        if self.task == "text-generation":
            shapes: Shapes = {"logits": (BATCH, "num_logits", self._config.vocab_size)}
        else:
            shapes = {"last_hidden_state": (BATCH, SEQUENCE, self._config.hidden_size)}
        if self.use_past:
            shapes |= {tensor.present: tensor.shape(TOTAL) for tensor in self.cache_tensors}
        if self.gives_columns:
            shapes |= {
                tensor.columns: tensor.state.columns_shape(SEQUENCE)
                for tensor in self.cache_tensors
                if tensor.state.gives_columns
            }
        return shapes

    def metadata(self) -> dict[str, str]:
        """Return what our runtime may rely on, as entries for the file's metadata.

        The graph pads heads whose width GroupQueryAttention does not take. The padded copy is no longer the cache's
        buffer, so such a graph cannot write keys and values in place.
        """
        in_place = head_dim(self._config) % ops.HEAD_DIM_MULTIPLE == 0
        return {ANY_PADDING: "true"} | ({IN_PLACE: str(in_place).lower()} if self.cache_tensors else {})

    def ordered_inputs(self, model: Any) -> dict[str, dict[int, str]]:
        """Return the inputs as declared. The patched model's forward takes them in this order."""
        return self.inputs

    def generate_dummy_inputs(self, framework: str = "pt", **shapes: Any) -> dict[str, Any]:
        """Return rows with padding on either side, over a filled cache where onnxruntime allows it.

        GroupQueryAttention refuses several rows with several new tokens over a filled cache (onnxruntime 1.32, CPU;
        `test_claims.py`). Optimum's default shapes therefore become one row of 16 tokens over a cache of 16. Other
        shapes stay, and have an empty cache where a filled one would be refused.

        Args:
            framework: Optimum's argument; the values are torch tensors.
            shapes: `batch_size` and `sequence_length`, else Optimum's defaults. Others do not matter.

        Returns:
            `input_ids`, int64 (batch_size, sequence_length). `attention_mask`, int64 (batch_size, past length +
            sequence_length). With past, `past_key_values`, a tuple of caches a layer. For text-generation,
            `num_logits_to_keep`, an int64 scalar.
        """
        default = {name: DEFAULT_DUMMY_SHAPES[name] for name in ("batch_size", "sequence_length")}
        wanted = {name: shapes.get(name, value) for name, value in default.items()}
        batch, length = (1, default["sequence_length"]) if wanted == default else wanted.values()
        return self._dummy_inputs(batch, length, full=batch == 1 or length == 1)

    def validation_inputs(self, shapes: Mapping[str, int]) -> list[dict[str, Any]]:
        """Return the inputs of each call that validation compares, in the form of `generate_dummy_inputs`.

        There are padded rows over an empty cache. With past there are also one token a row, and a chunk of one row,
        over a filled cache.

        Args:
            shapes: `batch_size` and `sequence_length`. Where these are not Optimum's defaults, there is one call.
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
        # A row may have three masked columns, and transformers 4.57 needs a kernel's width of visible ones to go on.
        past = max(FULL, self.member.kernel(self._config) + 3) if full and self.use_past_in_inputs else 0
        generator = torch.Generator().manual_seed(0)
        mask = torch.ones(batch, past + length, dtype=torch.int64)
        for row in range(batch):
            mask[row, : min(row % 2 * 2 + (past > 0), past + length - 1)] = 0  # padding on the left
            if length > 2 and row % 2 == 0:
                mask[row, -2:] = 0  # padding on the right
        inputs: dict[str, Any] = {
            self.TOKENS: self._dummy_tokens(batch, length, generator),
            "attention_mask": mask,
        }
        if self.use_past_in_inputs:
            inputs["past_key_values"] = self._dummy_caches(batch, past, generator)
        if self.task == "text-generation":
            inputs[LOGITS_TO_KEEP] = torch.tensor(0)
        return inputs

    def _dummy_tokens(self, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(0, self._config.vocab_size, (batch, length), generator=generator)

    def _dummy_caches(self, batch: int, past: int, generator: torch.Generator) -> list[tuple[torch.Tensor, ...]]:
        def values(tensor: CacheTensor) -> torch.Tensor:
            values = torch.randn((batch, *map(int, tensor.shape(past)[1:])), generator=generator)
            return (values if past else values * 0).to(tensor.state.dtype or DTYPES[self.float_dtype])

        return unflatten([values(tensor) for tensor in self.cache_tensors], self.cache_tensors)

    def flatten_output_collection_property(self, name: str, field: Iterable[Any]) -> dict[str, Any]:
        """Map the name of each cache to its tensor in `field`, which has one tuple a layer.

        Args:
            name: `past_key_values` for the inputs' names, `present` for the outputs'. Optimum answers for any other.
        """
        if name not in ("past_key_values", "present"):
            return super().flatten_output_collection_property(name, field)
        names = [tensor.past if name == "past_key_values" else tensor.present for tensor in self.cache_tensors]
        return dict(zip(names, flatten(field), strict=True))

    def fix_dynamic_axes(
        self, model_path: Path, device: str = "cpu", dtype: str | None = None, input_shapes: dict | None = None
    ) -> None:
        """Declare the shapes and stream the weights into the file. Optimum calls this right after the trace."""
        shapes = {**self.input_shapes(), **self.output_shapes()}
        logits_default = self._options.num_logits_to_keep == "optional"
        bind(model_path, self.weights, shapes, self.metadata(), self.scheme, logits_default, self.member.passes)

    def parts(self, model: Any) -> dict[str, tuple[Any, Lfm2OnnxConfig]]:
        """Return for each file of the model, by its part's name, a model to trace and its configuration."""
        return {MODEL: (model, self)}

    def validate(
        self, model: Any, path: Path, atol: float | None = None, shapes: Mapping[str, int] | None = None
    ) -> dict[str, float]:
        """Compare the exported file with transformers, as `validation.validate` does, with its result and errors."""
        return validate(self, model, path, atol, shapes)

    def post_process_exported_models(self, path: Path, models_and_onnx_configs: dict, onnx_files_subpaths: list[str]):
        """Write the files beside the graph for every runtime.

        Optimum would look for tied weights here. The file has one tensor for them already.
        """
        ((model, config),) = models_and_onnx_configs.values()  # it has read --model-kwargs
        write_sidecars(Path(path), getattr(model, "source", None), self.member, config.task)
        if config.task == "text-generation" and config.use_past:
            decoder = Path(path, onnx_files_subpaths[0])
            write_genai_config(Path(path), "", decoder, config._config, self.member, config.cache_tensors)
        return models_and_onnx_configs, onnx_files_subpaths


@cache
def _class_of_variant(plain: Any, name: str) -> Any:
    own = {"DEFAULT_VARIANT": name, "_plain_class": classmethod(lambda cls: plain), "__module__": plain.__module__}
    return type(plain.__name__, (plain,), own)


def _unpickled(plain: Any, name: str) -> Lfm2OnnxConfig:
    of_variant = _class_of_variant(plain, name)
    return of_variant.__new__(of_variant)


def _axes(shapes: Shapes) -> dict[str, dict[int, str]]:
    """Return the axes that vary, in the form that Optimum and torch want."""
    return {
        name: {i: axis for i, axis in enumerate(shape or ()) if isinstance(axis, str)} for name, shape in shapes.items()
    }
