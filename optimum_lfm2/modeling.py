"""Generation with an exported LFM2: transformers' `generate` on ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from optimum.onnxruntime import ORTModelForCausalLM
from optimum.onnxruntime.constants import ONNX_WEIGHTS_NAME
from optimum.onnxruntime.modeling import ORTModel
from transformers import GenerationConfig, PretrainedConfig
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import CONFIG_NAME

from optimum_lfm2 import compat
from optimum_lfm2.caches import with_float_caches
from optimum_lfm2.errors import Lfm2Error, first_line
from optimum_lfm2.export.config_check import check_fields
from optimum_lfm2.genai_config import GENAI_CONFIG, is_of_our_type, read_genai_config
from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.layout import GraphLayout
from optimum_lfm2.runtime.rows import RowRunner
from optimum_lfm2.runtime.session import GraphSession
from optimum_lfm2.runtime.threads import single_torch_thread
from optimum_lfm2.weights.companions import generation_settings


PREALLOCATED = 8192  # columns at most, of zeros that take no memory before they are used; longer sequences double them
WARNINGS_OFF = 3  # onnxruntime's severity "error": its warnings at load are about choices that were made on purpose
# What onnxruntime raises for a file that is no graph, or not one that it can run.
GRAPH_ERRORS = tuple(
    getattr(ort_errors, name)
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
)


class ORTLfm2ForCausalLM(compat.GenerationWithoutExperts, ORTModelForCausalLM):
    """LFM2 with a language modeling head on ONNX Runtime.

    `ORTModelForCausalLM.from_pretrained` returns this class for an LFM2 folder once `optimum_lfm2` is imported. It
    learns the caches from the graph, so that it also runs exports made by others. A row never depends on its
    neighbours: whatever `attention_mask` hides, on either side or between, it gets the tokens that it gets alone.
    """

    _supports_cache_class = True

    def __init__(
        self,
        *,
        config: PretrainedConfig,
        session: InferenceSession,
        use_io_binding: bool | None = None,
        generation_config: GenerationConfig | None = None,
        model_save_dir: str | Path | TemporaryDirectory | None = None,
    ) -> None:
        # Not ORTModelForCausalLM's: it looks for caches of its own models, and warns of what it does not find.
        ORTModel.__init__(
            self,
            config=config,
            session=session,
            use_io_binding=True if use_io_binding is None else use_io_binding,
            model_save_dir=model_save_dir,
        )
        self.layout = GraphLayout.read(session, config)
        self.layout.check(config, self.path)
        self.can_use_cache = bool(self.layout.caches)
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        if not self.can_use_cache:
            self.config.use_cache = self.generation_config.use_cache = False
        self._connect()

    def _connect(self) -> None:
        self._graph = GraphSession(self.session, self.layout, self.device)
        self._rows = RowRunner(self._graph, self.layout.any_padding)

    def to(self, *args: Any, **kwargs: Any) -> ORTLfm2ForCausalLM:
        super().to(*args, **kwargs)
        self._connect()
        return self

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Lfm2Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        cache: Lfm2Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of new tokens, and the cache that knows them.

        Args:
            input_ids: int64 (batch_size, sequence_length): the new tokens alone if there is a cache.
            attention_mask: int64 (batch_size, cached + sequence_length), 0 hides a token wherever it is. It alone
                decides positions; `position_ids` are not taken.
            past_key_values: the cache of an earlier call; it is changed, and returned.
            use_cache: whether to return a cache; by default what the config says.
            logits_to_keep: the logits of the last so many tokens only (0: all), or of the tokens at these indices.
            cache: another name for `past_key_values`, which transformers has from 5.24 on.

        Returns:
            `logits`, (batch_size, kept, vocab_size) in the graph's dtype, and the cache by transformers' name for it.

        Raises:
            Lfm2Error: for ids outside the vocabulary, a mask of another length, a prompt that is too long, arguments
                that an exported graph cannot honour.
        """
        self._refuse(kwargs)
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, Lfm2Cache):
            raise Lfm2Error(
                f"The cache is a {type(cache).__name__}; this model continues only the cache that it "
                "returned itself, which holds convolution states too."
            )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if (use_cache or cache is not None) and not self.can_use_cache:
            raise Lfm2Error(
                f"{self.path} has no cache inputs. Export it for text-generation-with-past, or pass use_cache=False."
            )
        attention_mask = self._checked(input_ids, attention_mask, cache)

        if cache is None and self.can_use_cache:
            cache = self._graph.new_cache(input_ids.shape[0])
        keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        logits = self._rows.run(input_ids, attention_mask, cache, keep, self.use_io_binding)
        if isinstance(logits_to_keep, torch.Tensor):
            logits = logits[:, logits_to_keep]
        cache = cache if use_cache else None
        if return_dict is False:
            return (logits,) if cache is None else (logits, cache)
        return CausalLMOutputWithPast(logits=logits, **{compat.CACHE: cache})  # type: ignore[arg-type]

    def _checked(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: Lfm2Cache | None) -> torch.Tensor:
        """The attention mask, after the checks that `forward` promises."""
        past = 0 if cache is None else cache.length
        batch, length = ids.shape[0], past + ids.shape[1]
        least, most = map(int, ids.aminmax())
        if least < 0 or most >= self.config.vocab_size:
            raise Lfm2Error(
                f"input_ids has {least} to {most}, outside the vocabulary of "
                f"{self.config.vocab_size}. Does the tokenizer belong to this model?"
            )
        if cache is not None and cache.batch_size != batch:
            raise Lfm2Error(f"input_ids has {batch} rows, but the cache has {cache.batch_size}.")
        if ids.shape[1] > 1 and length > self.config.max_position_embeddings:
            raise Lfm2Error(
                f"The prompt has {length} tokens; the model takes {self.config.max_position_embeddings} "
                "(max_position_embeddings in config.json). Shorten it."
            )
        if mask is None:
            return torch.ones((batch, length), dtype=torch.int64, device=ids.device)
        if tuple(mask.shape) != (batch, length):
            raise Lfm2Error(
                f"attention_mask has the shape {tuple(mask.shape)}; it needs {(batch, length)}: a column for each of "
                f"the {past} cached and {ids.shape[1]} new tokens."
            )
        return mask.to(torch.int64)

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        for name in ("inputs_embeds", "labels"):
            if kwargs.get(name) is not None:
                raise Lfm2Error(f"{name} cannot be used: the exported graph takes input_ids and gives logits.")
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise Lfm2Error(f"{name}=True cannot be honoured: the exported graph gives logits and caches alone.")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `generate`, with torch held to one thread until it returns.

        A cache to go on from is `past_key_values` or `cache`, whatever this transformers calls it.
        """
        past, cache = (kwargs.pop(name, None) for name in ("past_key_values", "cache"))
        if (cache := past if cache is None else cache) is not None:
            kwargs[compat.CACHE] = cache
        with single_torch_thread():
            return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
        *_: Any,
    ) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise Lfm2Error(
                "Assisted generation takes tokens back, and LFM2's convolution states cannot be undone. Leave it out."
            )
        if not generation_config.use_cache:
            return
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        if model_kwargs.get(compat.CACHE) is None:
            model_kwargs[compat.CACHE] = self._graph.new_cache(rows, min(max_cache_length, PREALLOCATED))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Lfm2Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Lfm2Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache has not seen, and the mask as it is."""
        cache = past_key_values if cache is None else cache
        if cache is not None:
            # The mask counts all tokens; the ids may be all of them or the new ones alone.
            length = (input_ids if attention_mask is None else attention_mask).shape[1]
            input_ids = input_ids[:, cache.length - length :]
        return {
            "input_ids": input_ids,
            compat.CACHE: cache,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **{name: value for name, value in kwargs.items() if name in ("output_attentions", "output_hidden_states")},
        }

    @staticmethod
    def _reorder_cache(past_key_values: Lfm2Cache, beam_idx: torch.Tensor) -> Lfm2Cache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    @classmethod
    def _from_pretrained(
        cls,
        model_id: str | Path,
        config: PretrainedConfig,
        subfolder: str = "",
        file_name: str | None = None,
        generation_config: GenerationConfig | None = None,
        session_options: SessionOptions | None = None,
        **kwargs: Any,
    ) -> ORTLfm2ForCausalLM:
        if session_options is None:
            session_options = SessionOptions()
            session_options.log_severity_level = WARNINGS_OFF
        file_name = file_name or _file_name(Path(model_id, subfolder))
        generation_config = generation_config or _generation_config(model_id, subfolder, kwargs)
        with _refused_graphs(Path(model_id, subfolder, file_name or ONNX_WEIGHTS_NAME)):
            return super()._from_pretrained(
                model_id,
                config,
                subfolder=subfolder,
                file_name=file_name,
                generation_config=generation_config,
                session_options=session_options,
                **kwargs,
            )


@contextmanager
def _refused_graphs(path: Path) -> Iterator[None]:
    """One line where onnxruntime cannot load a file."""
    try:
        yield
    except GRAPH_ERRORS as error:
        raise Lfm2Error(
            f"onnxruntime cannot load {path} ({first_line(error)}). Download or copy it again, with the file of its "
            "weights beside it, or export the checkpoint again."
        ) from error


def _file_name(folder: Path) -> str | None:
    """The name of a local folder's only model; None where Optimum finds model.onnx, or looks on the Hub.

    Raises:
        Lfm2Error: for several models of which none has that name; Optimum would take any.
    """
    names = [path.name for path in with_float_caches(folder.rglob("*.onnx"))]
    if not names or ONNX_WEIGHTS_NAME in names:
        return None
    if len(names) > 1:
        raise Lfm2Error(f'{folder} holds {", ".join(names)}. Choose one, such as file_name="{names[0]}".')
    return names[0]


def _generation_config(model_id: str | Path, subfolder: str, kwargs: dict[str, Any]) -> GenerationConfig | None:
    """The settings beside config.json, where Optimum looks into the model's subfolder alone."""
    hub = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    options = {name: kwargs[name] for name in hub if name in kwargs}
    folders = dict.fromkeys((subfolder, ""))
    found = (generation_settings(str(model_id), subfolder=folder, **options) for folder in folders)
    return next((settings for settings in found if settings is not None), None)


def _genai_folder(cls: type, model_id: Any, subfolder: str = "", **_: Any) -> Path | None:
    """Where a local folder has genai_config.json but no config.json, without which Optimum refuses it.

    `ORTModelForCausalLM` gets it only if it says that the model is ours.
    """
    folders = [Path(model_id, subfolder), Path(model_id)]
    if any((folder / CONFIG_NAME).is_file() for folder in folders):
        return None
    found = [folder for folder in folders if (folder / GENAI_CONFIG).is_file()]
    if not found or (cls is not ORTLfm2ForCausalLM and not is_of_our_type(found[0] / GENAI_CONFIG)):
        return None
    return found[0]


def _check_config(path: Path, model_types: tuple[str, ...]) -> None:
    """Refuse a local model of ours whose config.json cannot be, before transformers makes an object of it."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # nothing tells that it is ours
    if isinstance(written, dict) and written.get("model_type") in list(model_types):
        check_fields(written, str(path))


def dispatch(model_types: tuple[str, ...]) -> None:
    """Make `ORTModelForCausalLM` itself load and export these model types as `ORTLfm2ForCausalLM`.

    Every other model, and every other class, goes to Optimum's methods with the arguments as they came.
    """
    ORTModelForCausalLM.from_pretrained = classmethod(  # type: ignore[assignment]
        _checking_folders(ORTModelForCausalLM.from_pretrained.__func__, model_types)
    )
    for name in ("_from_pretrained", "_export"):
        original = getattr(ORTModelForCausalLM, name).__func__
        setattr(ORTModelForCausalLM, name, classmethod(_dispatching(original, model_types)))


def _checking_folders(original: Callable[..., Any], model_types: tuple[str, ...]) -> Callable[..., Any]:
    parameters = signature(original)

    @wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        folder = None
        if cls in (ORTModelForCausalLM, ORTLfm2ForCausalLM):
            with suppress(TypeError):  # of a wrong call, of which Optimum complains
                given = parameters.bind(cls, *args, **kwargs).arguments
                _check_config(Path(given["model_id"], given.get("subfolder") or "", CONFIG_NAME), model_types)
                if not given.get("config") and not given.get("export"):
                    folder = _genai_folder(**given)
        if folder is None:
            return original(cls, *args, **kwargs)
        options = {name: value for name, value in given.items() if name not in ("cls", "config", "export", "kwargs")}
        config = read_genai_config(folder)
        return ORTLfm2ForCausalLM._from_pretrained(config=config, **options, **given.get("kwargs", {}))

    return from_pretrained


def _dispatching(original: Callable[..., Any], model_types: tuple[str, ...]) -> Callable[..., Any]:
    @wraps(original)
    def method(cls: type, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config", args[1] if len(args) > 1 else None)
        if cls is ORTModelForCausalLM and getattr(config, "model_type", None) in model_types:
            return getattr(ORTLfm2ForCausalLM, original.__name__)(*args, **kwargs)
        return original(cls, *args, **kwargs)

    return method
