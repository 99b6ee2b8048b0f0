"""A row's next token, chosen as transformers' `generate` chooses it for the row alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMode


STOP, LENGTH = "stop", "length"  # why a text ends


def can_share(config: GenerationConfig) -> bool:
    """Return whether a row with these settings can share calls. Beams and the like need calls of their own."""
    return (
        config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and config.num_return_sequences in (None, 1)
        and config.guidance_scale in (None, 1)
        and config.max_time is None
        and config.use_cache is not False
    )


class Picker:
    """Chooses the tokens of one row, and says when its text ends.

    Args:
        model: whose `generate` it follows.
        ids: the prompt, int64 (length).
        config: the settings, as `generate` takes them. They name `max_new_tokens`.
        tokenizer: for stop strings.
        seed: of the row's own generator. The row gets the tokens that `generate` gives after `torch.manual_seed(seed)`.
            None takes any.
        processors: further logits processors.
    """

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        config: GenerationConfig,
        tokenizer: Any = None,
        seed: int | None = None,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        prepared: Any = model._prepare_generation_config(copy.deepcopy(config))[0]
        self.max_new_tokens = int(prepared.max_new_tokens)
        prepared.max_length = len(ids) + self.max_new_tokens
        model._prepare_special_tokens(prepared, True, device=torch.device("cpu"))
        # transformers' own: that of our models makes them for rows with padding, and this row has none.
        mixin: Any = GenerationMixin
        self._processors: Any = mixin._get_logits_processor(
            model,
            generation_config=prepared,
            input_ids_seq_length=len(ids),
            encoder_input_ids=ids[None],
            prefix_allowed_tokens_fn=None,
            logits_processor=LogitsProcessorList(processors),
            device="cpu",
            model_kwargs={},
        )
        self._sample = bool(prepared.do_sample)
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        ends = prepared._eos_token_tensor
        self._ends = frozenset() if ends is None else frozenset(ends.tolist())
        strings = prepared.stop_strings or ()
        self._strings = [strings] if isinstance(strings, str) else list(strings)
        self._tokenizer = tokenizer
        self._ids = torch.empty((1, prepared.max_length), dtype=torch.int64)
        self._ids[0, : len(ids)] = ids
        self._text = self._ids.numpy()[0]  # the same memory
        self._length, self._prompt = len(ids), len(ids)

    def pick(self, logits: np.ndarray) -> int:
        """Return the next token.

        Args:
            logits: float (vocab_size). They stay as they are.
        """
        if not self._sample and not self._processors:
            token = int(logits.argmax())
        else:
            values = torch.from_numpy(logits)[None].to(torch.float32, copy=True)
            scores = self._processors(self._ids[:, : self._length], values)
            if self._sample:
                chosen = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
            else:
                chosen = scores.argmax(-1)
            token = int(chosen)
        self._text[self._length] = token
        self._length += 1
        return token

    def ended(self) -> str | None:
        """Return why the text ends with the token that was picked last, or None if it goes on."""
        if int(self._text[self._length - 1]) in self._ends or self._at_stop_string():
            return STOP
        return LENGTH if self._length - self._prompt >= self.max_new_tokens else None

    def _at_stop_string(self) -> bool:
        """Whether a stop string ends within the last token, as transformers' criterion asks.

        That criterion compares the whole vocabulary with each string first, which takes seconds.
        """
        if not self._strings:
            return False
        longest = max(len(text.encode()) for text in self._strings) + 1
        tail = self._text[max(0, self._length - longest) : self._length].tolist()
        before, text = (
            self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for tokens in (tail[:-1], tail)
        )
        before = before.rstrip("\ufffd")  # the beginning of a character
        return any(text.find(stop, max(0, len(before) - len(stop) + 1)) >= 0 for stop in self._strings)
