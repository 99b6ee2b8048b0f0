"""The tokenizer and the chat template in the metadata of a GGUF file.

transformers 4.57 makes none for our architectures, and 5.24 one that adds no start token. So it is made here, of the
library `tokenizers`, alike on both.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.weights.gguf import GgufFile


# How llama.cpp splits a text before it merges (llama-vocab.cpp). By `tokenizer.ggml.pre`.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"lfm2": LLAMA_3, "llama-bpe": LLAMA_3}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # of `tokenizer.ggml.token_type`
NAMED = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
INPUTS = ["input_ids", "attention_mask"]
ELSE = "Give --tokenizer, the original model's folder or id."


def tokenizer_of(file: GgufFile) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer of a file, with its chat template. None where it has none.

    Raises:
        Lfm2Error: it is of a kind that is not known, or its parts do not fit each other.
    """

    def said(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"tokenizer.ggml.{key}", default)

    kind, split, tokens = said("model", "none"), said("pre"), said("tokens")
    if kind in ("none", "no_vocab"):
        return None
    if kind != "gpt2" or split not in PATTERNS:
        raise Lfm2Error(f"{file.path} has a tokenizer of the kind {kind}, {split}, which is not known here. {ELSE}")
    kinds = said("token_type", [])
    if not isinstance(tokens, list) or len(tokens) != len(kinds) or not isinstance(said("merges"), list):
        raise Lfm2Error(f"{file.path} has a tokenizer that is not complete. {ELSE}")
    try:
        tokenizer = _byte_level(tokens, kinds, said("merges"), PATTERNS[split])
        ids = {name: said(f"{key}_token_id") for name, key in NAMED.items()}
        named = {name: tokens[i] for name, i in ids.items() if i is not None}
    except Exception as error:  # `tokenizers` has no class of its own for its errors
        raise Lfm2Error(f"{file.path} has a tokenizer that does not work ({error}). {ELSE}") from None
    first = named.get("bos_token") if said("add_bos_token", True) else None
    last = named.get("eos_token") if said("add_eos_token", False) else None
    _add_around(tokenizer, first, last)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=INPUTS, clean_up_tokenization_spaces=False, **named
    )
    whole.chat_template = file.metadata.get("tokenizer.chat_template")
    return whole


def _byte_level(tokens: list[str], kinds: list[int], merges: list[str], pattern: str) -> Tokenizer:
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=True))  # as llama.cpp: a whole word comes first
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    for special, wanted in ((True, CONTROL), (False, USER_DEFINED)):
        added = [token for token, kind in zip(tokens, kinds, strict=True) if kind == wanted]
        added = [AddedToken(token, special=special, normalized=False) for token in added]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def _add_around(tokenizer: Tokenizer, first: str | None, last: str | None) -> None:
    """Let each text begin and end with a token; None adds none."""
    special = [(token, tokenizer.token_to_id(token)) for token in (first, last) if token is not None]
    if not special:
        return

    def around(part: str, kind: int) -> list[str]:
        return [f"{token}:{kind}" for token in (first, part, last) if token is not None]

    alone, second = around("$A", 0), around("$B", 1)
    tokenizer.post_processor = processors.TemplateProcessing(single=alone, pair=alone + second, special_tokens=special)
