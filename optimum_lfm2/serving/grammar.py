"""A text that follows a grammar: the tokens that llguidance allows, as a logits processor."""

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
TAIL = 16  # tokens in which the end of reasoning is looked for


class GrammarProcessor(LogitsProcessor):
    """Lets a row go on only with tokens that its grammar allows.

    Args:
        tokenizer: transformers' fast tokenizer.
        vocab_size: width of the logits.
        grammar: as llguidance has it, such as `json_grammar` or `lark_grammar` returns.
        after: the text after which the grammar begins, such as the end of reasoning. None for the first new token.

    Raises:
        Lfm2Error: llguidance does not take the grammar.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, grammar: str, after: str | None = None) -> None:
        self._matcher = llguidance.LLMatcher(_tokens(tokenizer, vocab_size), grammar)
        if self._matcher.is_error():
            raise _unusable(self._matcher.get_error())
        self._tokenizer, self._after = tokenizer, after
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocab_size)
        self._read: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the scores of all other tokens to minus infinity.

        Args:
            input_ids: int64 (1, length), with a token more at each call.
            scores: float32 (1, vocab_size).
        """
        length = input_ids.shape[1]
        if self._read is None:
            self._read = length  # the prompt
        elif self._after is not None:
            if self._after in self._tokenizer.decode(input_ids[0, max(self._read, length - TAIL) :]):
                self._after = None
            self._read = length if self._after is None else self._read
        elif not self._matcher.consume_tokens(input_ids[0, self._read :].tolist()):
            raise RuntimeError(f"The grammar did not follow: {self._matcher.get_error()}")
        else:
            self._read = length
        if self._after is not None:
            return scores
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        llguidance.numpy.apply_token_bitmask_inplace(scores.numpy(), self._mask)
        return scores


@lru_cache(maxsize=8)
def _tokens(tokenizer: Any, vocab_size: int) -> Any:
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size)


def json_grammar(schema: dict[str, Any]) -> str:
    """Return the grammar of a JSON schema.

    Raises:
        Lfm2Error: it is none that llguidance takes.
    """
    # Without blanks between its tokens: a small model writes nothing else for long.
    options = {"whitespace_flexible": False}
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    except ValueError as error:
        raise _unusable(error) from None


def lark_grammar(rules: str) -> str:
    """Return the grammar of rules in llguidance's Lark."""
    return llguidance.LLMatcher.grammar_from_lark(rules)


def _unusable(error: object) -> Lfm2Error:
    return Lfm2Error(f"The JSON schema cannot be used: {' '.join(str(error).split())[:300]}")


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
