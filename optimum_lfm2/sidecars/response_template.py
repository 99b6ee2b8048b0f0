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
THINK_START, THINK_END = "<think>", "</think>"
REASONING = {"open": THINK_START, "close": THINK_END, "content": "text"}
# LFM2 writes `<|tool_call_start|>[f(a=1), g(b="x")]<|tool_call_end|>`.
TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": REASONING,
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


# Others write `<tool_call><function=f><parameter=a>1</parameter></function></tool_call>`, a call in each element.
XML_MARKS = ("<tool_call>", "<function=", "<parameter=")
XML_TEMPLATE: dict[str, Any] = {
    **TEMPLATE,
    "fields": {
        "reasoning_content": REASONING,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": TEMPLATE["fields"]["content"],
    },
}


def template_for(tokenizer_tokens: object, chat_template: object = None) -> dict[str, Any] | None:
    """Return the template by which a model's answers are read, or None if it writes no tool calls in a known form.

    Args:
        tokenizer_tokens: its vocabulary, anything that knows `in`.
        chat_template: how it is shown earlier calls. Its text tells XML, for which there need be no tokens.
    """
    if isinstance(chat_template, str) and all(mark in chat_template for mark in XML_MARKS):
        return XML_TEMPLATE
    return TEMPLATE if CALL_START in tokenizer_tokens and CALL_END in tokenizer_tokens else None  # type: ignore[operator]


def write_response_template(folder: Path) -> None:
    """Add the template to the tokenizer's settings, where the model writes tool calls in a known form.

    A template of the checkpoint's own stays.

    Args:
        folder: holds `tokenizer.json` and `tokenizer_config.json`, or neither.
    """
    path, tokenizer = folder / FILE, folder / "tokenizer.json"
    if not path.is_file() or not tokenizer.is_file():
        return
    settings, added = read_object(path), read_object(tokenizer).get("added_tokens") or []
    chats = folder / "chat_template.jinja"
    chat_template = chats.read_text(encoding="utf-8") if chats.is_file() else settings.get("chat_template")
    template = template_for({token.get("content") for token in added}, chat_template)
    if template is None or settings.get(FIELD) is not None:
        return
    text = json.dumps({**settings, FIELD: template}, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
