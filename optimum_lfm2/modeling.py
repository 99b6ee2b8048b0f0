"""Generation with an exported LFM2: transformers' `generate` on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from onnxruntime import InferenceSession, SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM
from optimum.onnxruntime.base import ORTSessionMixin
from optimum.onnxruntime.constants import ONNX_WEIGHTS_NAME
from optimum.onnxruntime.modeling import ORTModel
from transformers import GenerationConfig, PretrainedConfig
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import MODEL_TYPES, member_of
from optimum_lfm2.loading.supported import check_onnxruntime
from optimum_lfm2.runtime.arguments import (
    PAGED,
    by_name,
    check_cache_type,
    check_columns,
    check_dtype,
    check_ids,
    check_kept,
    check_mask,
    check_positions,
    check_settings,
    check_target,
    is_empty,
    one_cache,
)
from optimum_lfm2.runtime.assisted import AssistedGeneration
from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.files import FileIdentity, generation_config_of, only_file, refused_graphs, save_session
from optimum_lfm2.runtime.layout import GraphLayout
from optimum_lfm2.runtime.padding_warning import right_padding_allowed
from optimum_lfm2.runtime.readers import criteria, noted, processors
from optimum_lfm2.runtime.request import REQUEST, SETTLED, Request, check_length, request_of
from optimum_lfm2.runtime.rows import RowRunner
from optimum_lfm2.runtime.session import GraphSession
from optimum_lfm2.runtime.threads import single_torch_thread


PREALLOCATED = 32768  # columns at most, which take no memory before they are used; longer sequences double them
WARNINGS_OFF = 3  # onnxruntime's severity "error": its warnings at load are about choices that were made on purpose


class ORTLfm2ForCausalLM(AssistedGeneration, compat.GenerationWithoutExperts, ORTModelForCausalLM):
    """LFM2 with a language modeling head on ONNX Runtime.

    `ORTModelForCausalLM.from_pretrained` returns this class for an LFM2 folder once `optimum_lfm2` is imported. It
    learns the caches from the graph, so that it also runs exports made by others. Batching does not change answers:
    whatever `attention_mask` hides, on either side or between, a row gets the tokens that it gets alone.
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
        compat.name_for_pipelines(type(self))
        self._text_config = config.get_text_config()  # of the decoder, where the model has other parts too
        self.layout = GraphLayout.read(session, self._text_config)
        self.layout.check(self._text_config, self.path)
        self._file = FileIdentity.of(self.path)
        self.can_use_cache = bool(self.layout.caches)
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        if not self.can_use_cache:
            self._text_config.use_cache = self.generation_config.use_cache = False
        self._connect()

    def _connect(self) -> None:
        self._graph = GraphSession(self.session, self.layout, self.device, self._file)
        self._rows = RowRunner(self._graph, self.layout.any_padding)

    @property
    def _others(self) -> tuple[ORTSessionMixin, ...]:
        """The sessions beside that of the decoder."""
        return ()

    def to(self, *args: Any, **kwargs: Any) -> ORTLfm2ForCausalLM:
        """Move the model to a device, as Optimum's models are moved.

        Raises:
            Lfm2Error: no provider runs there, or another dtype than the model's own is asked for.
        """
        check_target(args, kwargs, self.dtype)
        for part in self._others:
            part.to(*args, **kwargs)
        super().to(*args, **kwargs)
        self._connect()
        return self

    def eval(self) -> ORTLfm2ForCausalLM:
        """Return the model as it is, for code that was written for transformers: an exported graph does not train."""
        return self

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
        """Compute the logits of new tokens, and update the cache.

        Args:
            input_ids: integers (batch_size, sequence_length): the new tokens alone if there is a cache.
            attention_mask: int64 (batch_size, cached + sequence_length). A 0 hides a token wherever it is, anything
                else shows it. The mask alone decides positions, and `position_ids` that contradict it are refused.
            past_key_values: the cache of an earlier call. The call changes it and returns it.
            use_cache: whether to return a cache; by default what the config says.
            logits_to_keep: the logits of the last so many tokens only (0: all), or of the tokens at these indices.
            cache: another name for `past_key_values`, which transformers has from 5.24 on.
            kwargs: none that a user gives, but for those that are refused or, as in transformers, ignored.

        Returns:
            `logits`, (batch_size, kept, vocab_size) in the graph's dtype, and the cache by transformers' name for it.

        Raises:
            Lfm2Error: ids outside the vocabulary, a mask of another length, a prompt that is too long, another model's
                cache, or an argument that an exported graph cannot honour.
        """
        self._refuse(kwargs)
        cache = one_cache(past_key_values, cache)
        check_cache_type(cache)
        use_cache = self._text_config.use_cache if use_cache is None else use_cache
        if use_cache and not self.can_use_cache:
            raise Lfm2Error(
                f"{self.path} has no cache inputs. Export it for text-generation-with-past, or pass use_cache=False."
            )
        request = request_of(kwargs)
        attention_mask = self._checked(input_ids, attention_mask, cache, request)
        new, total = input_ids.shape[1], attention_mask.shape[1]
        if request is None:
            check_positions(kwargs.get("position_ids"), attention_mask, new)
            if compat.HEEDS_CACHE_POSITION:
                check_columns(kwargs.get("cache_position"), total, new)
        keep = check_kept(logits_to_keep, new)
        if cache is None and self.can_use_cache:
            cache = self._graph.new_cache(input_ids.shape[0])
        ids = self._entered(input_ids.to(torch.int64), cache, kwargs)

        prompt = request if request is not None and request.is_prompt(total) else None
        rows = self._rows.in_chunks(prompt.chunk) if prompt is not None and prompt.chunk else self._rows
        if prompt is not None and prompt.ends_apart:
            logits = rows.run_to_last(ids, attention_mask, cache, self.use_io_binding)
        elif isinstance(keep, int):
            logits = rows.run(ids, attention_mask, cache, keep, self.use_io_binding)
        else:
            logits = rows.run(ids, attention_mask, cache, 0, self.use_io_binding)[:, keep]
        if cache is not None and request is not None and (behind := request.behind_ends(total)) is not None:
            cache.hide(behind)
        cache = cache if use_cache else None
        if return_dict is False:
            return (logits,) if cache is None else (logits, cache)
        return CausalLMOutputWithPast(logits=logits, **{compat.CACHE: cache})  # type: ignore[arg-type]

    def _entered(self, ids: torch.Tensor, cache: Lfm2Cache | None, kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the ids as the graph's session takes them, int64."""
        return ids

    def _checked(
        self, ids: torch.Tensor, mask: torch.Tensor | None, cache: Lfm2Cache | None, request: Request | None
    ) -> torch.Tensor:
        """Check the arguments as `forward` promises, and return the attention mask as int64.

        What `generate` has checked, it says by its request. Candidates come after that, so each call looks at its ids.
        """
        if request is None:
            check_ids(ids)
            check_mask(mask)
        past = 0 if cache is None else cache.get_seq_length()
        batch, length = ids.shape[0], past + ids.shape[1]
        # A token of decode is one element, and `item` costs a quarter of a reduction.
        least, most = (ids.item(),) * 2 if ids.numel() == 1 else map(int, ids.aminmax())
        if least < 0 or most >= self._text_config.vocab_size:
            raise Lfm2Error(
                f"input_ids has {least} to {most}, outside the vocabulary of "
                f"{self._text_config.vocab_size}. Does the tokenizer belong to this model?"
            )
        if cache is not None and cache.batch_size != batch:
            raise Lfm2Error(f"input_ids has {batch} rows, but the cache has {cache.batch_size}.")
        if mask is not None and tuple(mask.shape) != (batch, length):
            raise Lfm2Error(
                f"attention_mask has the shape {tuple(mask.shape)}; it needs {(batch, length)}: a column for each of "
                f"the {past} cached and {ids.shape[1]} new tokens."
            )
        longest = self._text_config.max_position_embeddings
        if request is None and ids.shape[1] > 1 and length > longest:  # single tokens go on, as in transformers
            check_length(length if mask is None else int((mask != 0).sum(1).max()), longest)
        if mask is None:
            mask = torch.ones((batch, length), dtype=torch.int64, device=ids.device)
        elif request is None:
            mask = (mask != 0).to(torch.int64)
        return mask if cache is None else cache.shown(mask)

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        for name in ("inputs_embeds", "labels"):
            if kwargs.get(name) is not None:
                raise Lfm2Error(f"{name} cannot be used: the exported graph takes input_ids and gives logits.")
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise Lfm2Error(f"{name}=True cannot be honoured: the exported graph gives logits and caches alone.")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' `generate`, and hold torch to one thread until it returns.

        A chat goes on from the cache of an earlier turn, given as `past_key_values` or as `cache`, on every release of
        transformers. Then the ids are those of the whole chat, or new ones alone with an `attention_mask` of the whole.
        An empty cache of transformers counts as none. Rows may be padded on either side: logits processors and stopping
        criteria read the hidden tokens of each row before the others.

        Raises:
            Lfm2Error: for what `forward` refuses, and for settings that an exported graph cannot honour.
        """
        kwargs = self._understood(by_name(super().generate, args, kwargs))
        with single_torch_thread(), right_padding_allowed():
            return super().generate(**kwargs)

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Raises `Lfm2Error`: an exported graph brings its own attention."""
        raise Lfm2Error(PAGED)

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _understood(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Check the arguments of `generate`, and return them as transformers' loop takes them, with a `Request`."""
        self._refuse(kwargs)
        check_settings(kwargs)
        past, cache, inputs, ids = (
            kwargs.pop(name, None) for name in ("past_key_values", "cache", "inputs", "input_ids")
        )
        if inputs is not None and ids is not None:
            raise Lfm2Error("inputs and input_ids are two names for one argument. Give one of them.")
        ids, mask = inputs if ids is None else ids, kwargs.get("attention_mask")
        cache = one_cache(past, cache)
        if cache is not None and not is_empty(cache):
            check_cache_type(cache)
            kwargs[compat.CACHE] = cache
        kwargs[REQUEST] = Request.of(ids, mask, kwargs.get(compat.CACHE))
        if mask is not None:
            kwargs["attention_mask"] = (mask != 0).to(torch.int64)
        if ids is not None:
            kwargs["inputs"] = ids.to(torch.int64)
            positions = kwargs.pop("position_ids", None)
            check_positions(positions, torch.ones_like(ids) if mask is None else mask, ids.shape[1])
        return kwargs

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
            self._check_assisted(generation_config)
        # transformers 4.57 asks a drafting model for the last one.
        if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full"):
            raise Lfm2Error(
                f'cache_implementation="{generation_config.cache_implementation}" cannot be honoured: the exported '
                "graph has one kind of cache. Leave it out."
            )
        if generation_config.compile_config is not None:
            raise Lfm2Error("compile_config cannot be honoured: ONNX Runtime runs the exported graph. Leave it out.")
        request, cache = model_kwargs[REQUEST], model_kwargs.get(compat.CACHE)
        longest, cached = self._text_config.max_position_embeddings, cache is not None or generation_config.use_cache
        request.settle(generation_config, model_kwargs.get("attention_mask"), longest, cached)
        setattr(generation_config, SETTLED, request)  # transformers makes stopping criteria of it alone
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        if cache is not None and cache.batch_size != rows:
            raise Lfm2Error(
                f"The cache has {cache.batch_size} rows, and the call {rows}: beams and sequences of one row count. "
                "Repeat the cache's with batch_repeat_interleave."
            )
        if not generation_config.use_cache:
            return
        capacity = min(max_cache_length + request.before, PREALLOCATED)
        if cache is None:
            cache = model_kwargs[compat.CACHE] = self._graph.new_cache(rows, capacity)
            if generation_config.is_assistant:  # the model that it drafts for takes back what it does not accept
                cache.activate_past_recording()
        else:
            self._graph.make_room(cache, capacity)

    def _get_logits_processor(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        inner = super()._get_logits_processor(generation_config, *args, **kwargs)
        return processors(inner, getattr(generation_config, SETTLED).order)

    def _get_stopping_criteria(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        inner = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        request = getattr(generation_config, SETTLED)
        inner = criteria(inner, request.order)
        # A graph that is wrong on padding would run its rows one by one. Beams end as a whole.
        together = generation_config.use_cache and generation_config.num_beams == 1 and self.layout.any_padding
        return noted(inner, request.note_ends) if together else inner

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Lfm2Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Lfm2Cache | None = None,
        _request: Request | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Cut the ids to the tokens that the cache has not seen. The mask stays whole."""
        cache = past_key_values if cache is None else cache
        request = _request or Request.of(input_ids, attention_mask, cache)
        return {
            "input_ids": input_ids[:, input_ids.shape[1] - request.unseen(input_ids, cache) :],
            compat.CACHE: cache,
            "attention_mask": request.shown(attention_mask, input_ids.shape[1]),
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            REQUEST: _request,
            **{name: value for name, value in kwargs.items() if name in ("output_attentions", "output_hidden_states")},
        }

    @staticmethod
    def _reorder_cache(past_key_values: Lfm2Cache, beam_idx: torch.Tensor) -> Lfm2Cache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    def _save_pretrained(self, save_directory: str | Path) -> None:
        save_session(self, Path(save_directory))

    @classmethod
    def _export(cls, *args: Any, **kwargs: Any) -> ORTLfm2ForCausalLM:
        if kwargs.get("variant") is not None:  # Optimum exports in float, and would forget it
            raise Lfm2Error(
                f'variant="{kwargs["variant"]}" cannot be used with export=True. Export with main_export(..., '
                f'variant="{kwargs["variant"]}") or `optimum-cli export onnx --variant`, and load the folder.'
            )
        return super()._export(*args, **kwargs)

    @classmethod
    def _from_pretrained(
        cls,
        model_id: str | Path,
        config: PretrainedConfig,
        subfolder: str = "",
        file_name: str | None = None,
        generation_config: GenerationConfig | None = None,
        session_options: SessionOptions | None = None,
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> ORTLfm2ForCausalLM:
        if getattr(config, "model_type", None) in MODEL_TYPES:
            check_onnxruntime(member_of(config))
        if session_options is None:
            session_options = SessionOptions()
            session_options.log_severity_level = WARNINGS_OFF
        file_name = file_name or only_file(Path(model_id, subfolder))
        generation_config = generation_config or generation_config_of(model_id, subfolder, kwargs)
        with refused_graphs(Path(model_id, subfolder, file_name or ONNX_WEIGHTS_NAME)):
            model = super()._from_pretrained(
                model_id,
                config,
                subfolder=subfolder,
                file_name=file_name,
                generation_config=generation_config,
                session_options=session_options,
                **kwargs,
            )
        check_dtype(dtype, model.dtype)
        return model
