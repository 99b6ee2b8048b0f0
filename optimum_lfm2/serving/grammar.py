"""A text that follows a JSON schema: the tokens that llguidance allows, as a logits processor."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import torch
from transformers import LogitsProcessor

from optimum_lfm2.errors import Lfm2Error


ANY_OBJECT = {"type": "object"}


class GrammarProcessor(LogitsProcessor):
    """Lets a row go on only with tokens that its grammar allows.

    Args:
        tokenizer: transformers' fast tokenizer.
        vocab_size: width of the logits.
        schema: a JSON schema.

    Raises:
        Lfm2Error: the schema is none that llguidance takes.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, schema: dict[str, Any]) -> None:
        tokens = _tokens(tokenizer, vocab_size)
        # Without blanks between its tokens: a small model writes nothing else for long.
        options = {"whitespace_flexible": False}
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
            self._matcher = llguidance.LLMatcher(tokens, grammar)
            wrong = self._matcher.get_error() if self._matcher.is_error() else ""
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise Lfm2Error(f"The JSON schema cannot be used: {' '.join(wrong.split())[:300]}")
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocab_size)
        self._read: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the scores of all other tokens to minus infinity.

        Args:
            input_ids: int64 (1, length), with a token more at each call.
            scores: float32 (1, vocab_size).
        """
        if self._read is None:
            self._read = input_ids.shape[1]  # the prompt
        elif not self._matcher.consume_tokens(input_ids[0, self._read :].tolist()):
            raise RuntimeError(f"The grammar did not follow: {self._matcher.get_error()}")
        self._read = input_ids.shape[1]
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        llguidance.numpy.apply_token_bitmask_inplace(scores.numpy(), self._mask)
        return scores


@lru_cache(maxsize=8)
def _tokens(tokenizer: Any, vocab_size: int) -> Any:
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size)


def schema_of(response_format: Any) -> dict[str, Any] | None:
    """Return the schema that OpenAI's `response_format` asks for, or None for plain text.

    Raises:
        Lfm2Error: it asks for something else.
    """
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind == "json_schema":
        given = response_format.get("json_schema")
        schema = given.get("schema") if isinstance(given, dict) else None
        if isinstance(schema, dict):
            return schema
    raise Lfm2Error(
        'response_format has to be {"type": "json_schema", "json_schema": {"schema": {...}}}, {"type": "json_object"} '
        'or {"type": "text"}.'
    )
