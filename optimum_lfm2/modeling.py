"""Generation with an exported LFM2: transformers' `generate` on ONNX Runtime."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from onnxruntime import InferenceSession, SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM
from optimum.onnxruntime.constants import ONNX_WEIGHTS_NAME
from optimum.onnxruntime.modeling import ORTModel
from transformers import GenerationConfig, PretrainedConfig
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.arguments import (
    check_cache_type,
    check_columns,
    check_ids,
    check_kept,
    check_positions,
    is_empty,
    one_cache,
)
from optimum_lfm2.runtime.assisted import AssistedGeneration
from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.files import FileIdentity, generation_config_of, only_file, refused_graphs, save_session
from optimum_lfm2.runtime.layout import GraphLayout
from optimum_lfm2.runtime.padding_warning import right_padding_allowed
from optimum_lfm2.runtime.rows import RowRunner
from optimum_lfm2.runtime.session import GraphSession
from optimum_lfm2.runtime.threads import single_torch_thread


PREALLOCATED = 32768  # columns at most, which take no memory before they are used; longer sequences double them
WARNINGS_OFF = 3  # onnxruntime's severity "error": its warnings at load are about choices that were made on purpose


class ORTLfm2ForCausalLM(AssistedGeneration, compat.GenerationWithoutExperts, ORTModelForCausalLM):
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

    def to(self, *args: Any, **kwargs: Any) -> ORTLfm2ForCausalLM:
        super().to(*args, **kwargs)
        self._connect()
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
        last_token_only: bool = False,
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
            last_token_only: return only the logits of each row's last unmasked token, (batch_size, 1, vocab_size), and
                ignore `logits_to_keep`. `generate` needs them for rows that are padded on the right.

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
        attention_mask = self._checked(input_ids, attention_mask, cache)
        check_positions(kwargs.get("position_ids"), attention_mask, input_ids.shape[1])
        if compat.HEEDS_CACHE_POSITION:
            check_columns(kwargs.get("cache_position"), attention_mask.shape[1], input_ids.shape[1])
        check_kept(logits_to_keep)
        input_ids, rows = self._enter(input_ids.to(torch.int64), kwargs)

        if cache is None and self.can_use_cache:
            cache = self._graph.new_cache(input_ids.shape[0])
        if last_token_only:
            logits = rows.run_to_last(input_ids, attention_mask, cache, self.use_io_binding)
        else:
            keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
            logits = rows.run(input_ids, attention_mask, cache, keep, self.use_io_binding)
            if isinstance(logits_to_keep, torch.Tensor):
                logits = logits[:, logits_to_keep]
        cache = cache if use_cache else None
        if return_dict is False:
            return (logits,) if cache is None else (logits, cache)
        return CausalLMOutputWithPast(logits=logits, **{compat.CACHE: cache})  # type: ignore[arg-type]

    def _enter(self, ids: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, RowRunner]:
        """Return the ids as the graph's session takes them, int64, and what runs them."""
        return ids, self._rows

    def _checked(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: Lfm2Cache | None) -> torch.Tensor:
        """Check the arguments as `forward` promises, and return the attention mask as int64."""
        check_ids(ids)
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
        prompt = past == 0 or cache.recording is None  # candidates go beyond the limit as single tokens do
        if prompt and ids.shape[1] > 1 and length > self._text_config.max_position_embeddings:
            raise Lfm2Error(
                f"The prompt has {length} tokens; the model takes {self._text_config.max_position_embeddings} "
                "(max_position_embeddings in config.json). Shorten it."
            )
        if mask is None:
            return torch.ones((batch, length), dtype=torch.int64, device=ids.device)
        if tuple(mask.shape) != (batch, length):
            raise Lfm2Error(
                f"attention_mask has the shape {tuple(mask.shape)}; it needs {(batch, length)}: a column for each of "
                f"the {past} cached and {ids.shape[1]} new tokens."
            )
        return (mask != 0).to(torch.int64)

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        for name in ("inputs_embeds", "labels"):
            if kwargs.get(name) is not None:
                raise Lfm2Error(f"{name} cannot be used: the exported graph takes input_ids and gives logits.")
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise Lfm2Error(f"{name}=True cannot be honoured: the exported graph gives logits and caches alone.")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' `generate`, and hold torch to one thread until it returns.

        The cache of an earlier turn may be given as `past_key_values` or as `cache`, on every release of transformers.
        An empty cache of transformers counts as none. Rows may be padded on either side. Logits processors that read
        the prompt, such as a repetition penalty, see the padding tokens too.

        Raises:
            Lfm2Error: for what `forward` refuses, and for settings that an exported graph cannot honour.
        """
        kwargs |= dict(zip(signature(super().generate).parameters, args, strict=False))
        past, cache = (kwargs.pop(name, None) for name in ("past_key_values", "cache"))
        cache = one_cache(past, cache)
        if cache is not None and not is_empty(cache):
            check_cache_type(cache)
            kwargs[compat.CACHE] = cache
        for name in ("inputs", "input_ids"):
            if isinstance(ids := kwargs.get(name), torch.Tensor):
                check_ids(ids)
                kwargs[name] = ids.to(torch.int64)
                mask = kwargs.get("attention_mask")
                positions = kwargs.pop("position_ids", None)
                check_positions(positions, torch.ones_like(ids) if mask is None else mask, ids.shape[1])
        with single_torch_thread(), right_padding_allowed():
            return super().generate(**kwargs)

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
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            model_kwargs["last_token_only"] = True
            # A chunk may hold nothing of a row. `forward` reads long prompts in chunks of its own.
            generation_config.prefill_chunk_size = None
        if not generation_config.use_cache:
            return
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        capacity, cache = min(max_cache_length, PREALLOCATED), model_kwargs.get(compat.CACHE)
        if cache is None:
            cache = model_kwargs[compat.CACHE] = self._graph.new_cache(rows, capacity)
            if generation_config.is_assistant:  # the model that it drafts for takes back what it does not accept
                cache.activate_past_recording()
        else:
            self._graph.make_room(cache, capacity)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Lfm2Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Lfm2Cache | None = None,
        last_token_only: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Cut the ids to the tokens that the cache has not seen. The mask stays whole."""
        cache = past_key_values if cache is None else cache
        if cache is not None:
            # The mask counts all tokens; the ids may be all of them or the new ones alone.
            length = (input_ids if attention_mask is None else attention_mask).shape[1]
            input_ids = input_ids[:, cache.get_seq_length() - length :]
        return {
            "input_ids": input_ids,
            compat.CACHE: cache,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            # For a prompt with padding on the right. No row masks a token that follows the prompt.
            "last_token_only": last_token_only and not bool(attention_mask[:, -1].all()),  # type: ignore[index]
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
        **kwargs: Any,
    ) -> ORTLfm2ForCausalLM:
        if session_options is None:
            session_options = SessionOptions()
            session_options.log_severity_level = WARNINGS_OFF
        file_name = file_name or only_file(Path(model_id, subfolder))
        generation_config = generation_config or generation_config_of(model_id, subfolder, kwargs)
        with refused_graphs(Path(model_id, subfolder, file_name or ONNX_WEIGHTS_NAME)):
            return super()._from_pretrained(
                model_id,
                config,
                subfolder=subfolder,
                file_name=file_name,
                generation_config=generation_config,
                session_options=session_options,
                **kwargs,
            )
