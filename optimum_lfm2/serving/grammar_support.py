"""Grammars, where llguidance is installed."""

from __future__ import annotations

from typing import Any

from optimum_lfm2.errors import Lfm2Error


def grammar_for(tokenizer: Any, vocab_size: int, response_format: Any) -> list[Any]:
    """Return the logits processors of a `response_format`: none for plain text.

    Raises:
        Lfm2Error: it is none that can be honoured, or llguidance is not installed.
    """
    try:
        from optimum_lfm2.serving.grammar import GrammarProcessor, schema_of
    except ImportError:
        raise Lfm2Error("response_format needs llguidance on the server: pip install llguidance") from None
    schema = schema_of(response_format)
    return [] if schema is None else [GrammarProcessor(tokenizer, vocab_size, schema)]
