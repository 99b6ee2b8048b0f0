"""The corpus: a seeded mixture of stories, chats and pages of facts, all of it generated from this folder."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from chats import Message, chat, fact_page
from stories import story
from tokenizer import BOS, EOS
from transformers import PreTrainedTokenizerFast


Document = str | list[Message]
MAKERS: list[Callable[[random.Random], Document]] = [story, chat, fact_page]


def documents(seed: int) -> Iterator[Document]:
    """Yield documents without end. A string is plain text, a list of messages is a chat."""
    rng = random.Random(seed)
    while True:
        yield rng.choices(MAKERS, [40, 50, 10])[0](rng)


def render(document: Document, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the text of a document with its special tokens. Plain text ends as a turn of a chat does."""
    if isinstance(document, str):
        return f"{BOS}{document}{EOS}\n"
    return str(tokenizer.apply_chat_template(document, tokenize=False))


def plain_texts(seed: int, count: int) -> Iterator[str]:
    """Yield text without special tokens, on which the tokenizer is trained."""
    for document in islice(documents(seed), count):
        yield document if isinstance(document, str) else "\n".join(message["content"] for message in document)


def write_heldout(path: Path, tokenizer: PreTrainedTokenizerFast, seed: int, size: int) -> set[str]:
    """Write about ``size`` bytes of rendered documents and return them, so that the training can skip them."""
    texts: list[str] = []
    written = 0
    for document in documents(seed):
        texts.append(render(document, tokenizer))
        written += len(texts[-1])
        if written >= size:
            break
    path.write_text("".join(texts), encoding="utf-8")
    return set(texts)
