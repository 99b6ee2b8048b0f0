"""Grammars of a request, where llguidance is installed."""

from __future__ import annotations

from typing import Any

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.serving.tool_grammar import call_grammar
from optimum_lfm2.sidecars.response_template import CALL_END, CALL_START, TEMPLATE, THINK_END, THINK_START


SHOWN = 32  # tokens at the end of a prompt, where a template opens reasoning


def grammar_for(tokenizer: Any, vocab_size: int, prompt: Any, response_format: Any, called: Any) -> list[Any]:
    """Return the logits processors of what a request asks for: none for plain text.

    Where the prompt opens reasoning, the grammar begins when that has ended.

    Args:
        tokenizer: the model's.
        vocab_size: width of the logits.
        prompt: its tokens, int64 (1, length).
        response_format: as OpenAI's field is, or None.
        called: what `called_functions` returns.

    Raises:
        Lfm2Error: it cannot be honoured, or llguidance is not installed.
    """
    if response_format is None and called is None:
        return []
    try:
        from optimum_lfm2.serving.grammar import GrammarProcessor, json_grammar, lark_grammar, schema_of
    except ImportError:
        what = "response_format" if called is None else "tool_choice"
        raise Lfm2Error(f"{what} needs llguidance on the server: pip install llguidance") from None
    schema = None if response_format is None else schema_of(response_format)
    if called is not None:
        if schema is not None:
            raise Lfm2Error("An answer cannot both call a tool and follow response_format. Ask for one of them.")
        if getattr(tokenizer, "response_template", None) != TEMPLATE:
            raise Lfm2Error('tool_choice: this model\'s form of calls cannot be demanded. Use "auto" or "none".')
        functions, several = called
        start, end = tokenizer.convert_tokens_to_ids([CALL_START, CALL_END])
        grammar = lark_grammar(call_grammar(functions, start, end, several))
    elif schema is not None:
        grammar = json_grammar(schema)
    else:
        return []
    shown = tokenizer.decode(prompt[0, -SHOWN:])
    thinks = shown.rfind(THINK_START) > shown.rfind(THINK_END)
    return [GrammarProcessor(tokenizer, vocab_size, grammar, THINK_END if thinks else None)]
