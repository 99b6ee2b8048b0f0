"""Assisted generation: what transformers' loop needs to know of our caches, and candidates from the prompt."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import CandidateGenerator, StoppingCriteriaList

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.lookup import PromptLookup
from optimum_lfm2.runtime.readers import LAST_TOKEN
from optimum_lfm2.runtime.request import REQUEST


UNTIL = "stopping_criteria_of_candidates"  # among the arguments of the loop, which hands them to its generator


class AssistedGeneration:
    """Methods that `generate` calls where several tokens may be accepted at once."""

    _text_config: Any
    layout: Any

    def _check_assisted(self, generation_config: GenerationConfig) -> None:
        """Raise `Lfm2Error` for kinds of assistance that an exported graph cannot give."""
        for name in ("assistant_early_exit", "use_mtp"):
            if getattr(generation_config, name, None):
                raise Lfm2Error(
                    f"{name} cannot be honoured: the exported graph runs all its layers, and has no others. Draft by "
                    "prompt_lookup_num_tokens, or by another model as assistant_model."
                )
        if not generation_config.use_cache:
            raise Lfm2Error(
                "Assisted generation needs a cache. Pass use_cache=True, and export for text-generation-with-past."
            )

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, request = kwargs[compat.CACHE], kwargs[REQUEST]
        if request.before:
            raise Lfm2Error(
                f"input_ids has {request.given} tokens of a text of {request.total}. Assisted generation takes all "
                "tokens of a chat, those that the cache has seen too."
            )
        if kwargs.get("assistant_model") is None:
            kwargs[UNTIL] = kwargs.get("stopping_criteria")
        elif request.ends_apart:
            raise Lfm2Error("An assistant_model takes no padding on the right. Cut input_ids after its last token.")
        recorded = cache.record.recording
        cache.activate_past_recording()
        try:
            return super()._assisted_decoding(input_ids, *args, **kwargs)  # type: ignore[misc]
        finally:
            if not recorded:
                cache.stop_recording()

    def _get_candidate_generator(
        self, generation_config: GenerationConfig, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> CandidateGenerator:
        criteria = model_kwargs.pop(UNTIL, None)
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != REQUEST}  # a drafter has its own
        most = generation_config.prompt_lookup_num_tokens
        if most is None:
            return super()._get_candidate_generator(  # type: ignore[misc]
                generation_config, *args, model_kwargs=model_kwargs, **kwargs
            )
        sizes = generation_config.max_matching_ngram_size or 2
        if most < 1 or sizes < 1:
            raise Lfm2Error(
                f"prompt_lookup_num_tokens is {most}, max_matching_ngram_size {sizes}: give numbers from 1 on."
            )
        ends = getattr(generation_config, "_eos_token_tensor", None)
        cache = model_kwargs[compat.CACHE]
        return PromptLookup(
            most,
            sizes,
            min(generation_config.max_length, self._text_config.max_position_embeddings),
            ends=() if ends is None else ends.tolist(),
            stops=_stops(criteria),
            pending=lambda: cache.get_seq_length() - cache.length,
            replays=not self.layout.gives_columns,
        )


def _stops(criteria: StoppingCriteriaList | None) -> Any:
    # Candidates cannot meet the others early: they leave these out themselves, or no text meets them.
    others = [one for one in criteria or () if not isinstance(one, LAST_TOKEN)]
    if not others:
        return None
    return lambda ids: any(bool(one(ids, None).all()) for one in others)
