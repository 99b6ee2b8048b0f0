"""A tokenizer of the real one's shape: 64,400 tokens for a model of 65,536 rows, and a template that takes tools."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast


TOKENS, ROWS = 64_400, 65_536
SPECIAL = [
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>",
    "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
    "<|tool_response_start|>", "<|tool_response_end|>", *(f"<|reserved_{i}|>" for i in range(486)),
]  # fmt: skip
TEMPLATE = """
{{- bos_token -}}
{%- set ns = namespace(system="") -%}
{%- if messages[0]["role"] == "system" -%}
  {%- set ns.system = messages[0]["content"] -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
  {%- set ns.system = ns.system + ("\\n" if ns.system else "") + "List of tools: <|tool_list_start|>[" -%}
  {%- for tool in tools -%}
    {%- set ns.system = ns.system + (tool if tool is string else tool | tojson) + ("" if loop.last else ", ") -%}
  {%- endfor -%}
  {%- set ns.system = ns.system + "]<|tool_list_end|>" -%}
{%- endif -%}
{%- if ns.system -%}{{- "<|im_start|>system\\n" + ns.system + "<|im_end|>\\n" -}}{%- endif -%}
{%- for message in messages -%}
  {%- set content = message["content"] if message["content"] is string else message["content"] | tojson -%}
  {%- if message["role"] == "tool" -%}
    {%- set content = "<|tool_response_start|>" + content + "<|tool_response_end|>" -%}
  {%- endif -%}
  {{- "<|im_start|>" + message["role"] + "\\n" + content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""


def write_tokenizer(folder: Path) -> Path:
    """Write the tokenizer's files into a folder. Its merges are pairs of bytes, in their order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(itertools.islice(itertools.product(letters, letters), TOKENS - len(SPECIAL) - len(letters)))
    vocabulary = [*SPECIAL, *letters, *map("".join, merges)]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[1],
        eos_token="<|im_end|>",
        pad_token=SPECIAL[0],
        model_input_names=["input_ids", "attention_mask"],
    )
    own.chat_template = TEMPLATE
    own.save_pretrained(folder)
    return folder


def tool(name: str, *arguments: str) -> dict:
    """A tool with arguments of text, as chats give it."""
    properties = {argument: {"type": "string", "description": f"The {argument}"} for argument in arguments}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}", "parameters": parameters}}


def called(name: str, **arguments: str) -> str:
    """What a model writes to call a tool."""
    given = ", ".join(f"{key}={json.dumps(value)}" for key, value in arguments.items())
    return f"<|tool_call_start|>[{name}({given})]<|tool_call_end|>"
