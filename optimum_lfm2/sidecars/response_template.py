"""How an answer's text becomes a message: `response_template` in tokenizer_config.json, which transformers 5.24 reads.

transformers' parser then gives tool calls and reasoning as structured output. Older releases ignore the field.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optimum_lfm2.errors import read_object


FIELD, FILE = "response_template", "tokenizer_config.json"
CALL_START, CALL_END = "<|tool_call_start|>", "<|tool_call_end|>"
# LFM2 writes `<|tool_call_start|>[f(a=1), g(b="x")]<|tool_call_end|>`.
TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            # The blank before it must not open a region of content, whose end would replace the content so far.
            "open_pattern": r"\s*<\|tool_call_start\|>",
            "close": CALL_END,
            "content": "python-call-list",
            "transform_each": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
    },
}


def template_for(tokenizer_tokens: object) -> dict[str, Any] | None:
    """Return the template for a vocabulary, anything that knows `in`, or None if it has no tokens for tool calls."""
    return TEMPLATE if CALL_START in tokenizer_tokens and CALL_END in tokenizer_tokens else None  # type: ignore[operator]


def write_response_template(folder: Path) -> None:
    """Add the template to the tokenizer's settings, where the vocabulary writes tool calls as LFM2 does.

    A template of the checkpoint's own stays.

    Args:
        folder: holds `tokenizer.json` and `tokenizer_config.json`, or neither.
    """
    path, tokenizer = folder / FILE, folder / "tokenizer.json"
    if not path.is_file() or not tokenizer.is_file():
        return
    settings, added = read_object(path), read_object(tokenizer).get("added_tokens") or []
    template = template_for({token.get("content") for token in added})
    if template is None or settings.get(FIELD) is not None:
        return
    text = json.dumps({**settings, FIELD: template}, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
