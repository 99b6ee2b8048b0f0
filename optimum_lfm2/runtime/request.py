"""What a call of `generate` asks for: how many tokens the text has, and which of them are new. It is decided once.

transformers' loop gets the ids of the caller, adds a token to them at each step, and asks for the inputs of the next
call. A mask is no measure of the text: transformers 5.24 drops one that hides nothing. So a `Request` travels with the
loop. The text is always as long as the ids and the tokens before them, and the cache says how many of them it has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.arguments import check_ids, check_mask
from optimum_lfm2.runtime.cache import Lfm2Cache


REQUEST = "_request"  # its name among the arguments that transformers' loop hands on
OPEN = 2**62  # where a row ends that goes on
# Its name in the settings of the call. Another one, or transformers would take the argument for a setting.
SETTLED = "_settled_request"


@dataclass(frozen=True)
class Pictures:
    """The pictures of a prompt.

    Attributes:
        features: float32 (picture tokens, hidden_size).
        numbered: the prompt's ids, int64 (batch_size, length): the i-th picture token is vocab_size + i.
    """

    features: torch.Tensor
    numbered: torch.Tensor


@dataclass
class Request:
    """A call of `generate`.

    Attributes:
        total: columns of the text when the call begins, those that the cache has seen included.
        given: columns of `input_ids` when the call begins.
        new: columns that the cache has not seen. `input_ids` ends with them.
        chunk: of how many columns the chunks are in which the prompt is read; None for the runtime's own.
        ends_apart: whether rows end in different columns, since they have padding on the right.
        order: puts the hidden columns of each row first, int64 (batch_size, given); None where they are.
        pictures: those of the prompt.
        ends: of each row the columns of the text that has ended, int64 (rows), or `OPEN`; None while all rows go on.
    """

    total: int
    given: int
    new: int
    chunk: int | None = None
    ends_apart: bool = False
    order: torch.Tensor | None = None
    pictures: Pictures | None = None
    ends: torch.Tensor | None = None

    @classmethod
    def of(cls, ids: torch.Tensor | None, mask: torch.Tensor | None, cache: Lfm2Cache | None) -> Request:
        """Check the arguments of a call against each other.

        Args:
            ids: integers (batch_size, length): the whole text, or what follows the tokens of the cache. None for a text
                that transformers begins with the start token.
            mask: (batch_size, total) of all columns of the text, also of cached ones. Without it, `ids` is the text.
            cache: the cache of the text's beginning.

        Raises:
            Lfm2Error: they do not fit each other, or the text has nothing new.
        """
        seen = 0 if cache is None else cache.get_seq_length()
        if ids is not None:
            check_ids(ids)
        rows, given = (None, 1) if ids is None else ids.shape
        check_mask(mask)
        total = given if mask is None else mask.shape[1]
        if mask is not None and (total not in (given, seen + given) or rows not in (None, len(mask))):
            rows = rows or 1
            or_both = f", or {(rows, seen + given)}, if the {seen} tokens of the cache come before them" if seen else ""
            raise Lfm2Error(
                f"attention_mask has the shape {tuple(mask.shape)}; it needs {(rows, given)}, a column for each token "
                f"of input_ids{or_both}."
            )
        if total <= seen:
            raise Lfm2Error(
                f"The text has {total} tokens, and the cache has seen {seen}: nothing is new. Give all tokens of the "
                f"chat as input_ids; or new ones alone, with an attention_mask of all {seen} + {given} columns."
            )
        return cls(total, given, total - seen)

    @property
    def before(self) -> int:
        """The columns of the text before `input_ids`, which the cache alone has."""
        return self.total - self.given

    def settle(self, config: GenerationConfig, mask: torch.Tensor | None, longest: int, cached: bool) -> None:
        """Take what the settings of the call say, once transformers has put them together.

        Args:
            config: the settings of this call. Those that are honoured here are unset in it.
            mask: (rows, total), maybe one that transformers inferred from padding tokens; None where nothing is hidden.
            longest: the tokens that a prompt may have, `max_position_embeddings`.
            cached: whether the call has a cache.

        Raises:
            Lfm2Error: the prompt is too long, or a setting is impossible.
        """
        shown = self.total if mask is None else int((mask != 0).sum(1).max())
        check_length(shown, longest)
        if (size := config.prefill_chunk_size) is not None:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise Lfm2Error(f"prefill_chunk_size is {size}: give a number of tokens from 1 on, or leave it out.")
            if not cached:
                raise Lfm2Error("prefill_chunk_size needs a cache. Pass use_cache=True, or leave it out.")
            # transformers' chunks are ids that do not say where in the text they are.
            self.chunk, config.prefill_chunk_size = size, None
        if mask is None:
            return
        own = (mask[:, -self.given :] != 0).to(torch.int64)
        self.ends_apart = not bool(own[:, -1].all())
        if bool((own.diff(dim=1) < 0).any()):
            self.order = own.argsort(dim=1, stable=True)

    def unseen(self, ids: torch.Tensor, cache: Lfm2Cache | None) -> int:
        """Return how many columns of the loop's ids the cache has not seen; all of them without a cache."""
        return ids.shape[1] if cache is None else ids.shape[1] + self.before - cache.get_seq_length()

    def note_ends(self, done: torch.Tensor, length: int) -> None:
        """Note which rows of several have ended, bool (rows), after so many of the loop's ids.

        transformers writes padding behind them. A row that has not read it can go on in a later turn.
        """
        if self.ends is None:
            if len(done) == 1 or not bool(done.any()):
                return
            self.ends = torch.full((len(done),), OPEN)
        self.ends = torch.where(done.cpu() & (self.ends == OPEN), length + self.before, self.ends)

    def behind_ends(self, total: int) -> torch.Tensor | None:
        """Return the columns behind the end of each row, bool (rows, total); None while all rows go on."""
        return None if self.ends is None else torch.arange(total) >= self.ends[:, None]

    def shown(self, mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """Return the mask of a call that ends after so many of the loop's ids. It hides what is behind a row's end."""
        behind = self.behind_ends(length + self.before)
        if behind is None:
            return mask
        mask = torch.ones(behind.shape, dtype=torch.int64) if mask is None else mask
        return mask.masked_fill(behind.to(mask.device), 0)

    def is_prompt(self, length: int) -> bool:
        """Whether a call that ends at this length of the text is the one that reads the prompt."""
        return length == self.total

    def pictures_of(self, ids: torch.Tensor, new: int) -> Pictures | None:
        """Return the pictures with the numbered ids of a call: the last `new` of the loop's ids. None without any."""
        start = ids.shape[1] - new
        if self.pictures is None or start >= self.given:
            return None
        numbered = self.pictures.numbered
        numbered = numbered.repeat_interleave(len(ids) // len(numbered), dim=0)  # beams and sequences of one row
        return Pictures(self.pictures.features, torch.cat([numbered[:, start:], ids[:, self.given :]], dim=1))


def check_length(shown: int, longest: int) -> None:
    """Raise `Lfm2Error` for a prompt of more tokens than the model takes. Hidden columns are none."""
    if shown > longest:
        raise Lfm2Error(
            f"The prompt has {shown} tokens; the model takes {longest} (max_position_embeddings in config.json). "
            "Shorten it."
        )


def request_of(kwargs: dict[str, Any]) -> Request | None:
    """Return the request among the arguments that the loop hands on. Whoever calls `forward` has none."""
    return kwargs.get(REQUEST)
