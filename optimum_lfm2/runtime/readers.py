"""What reads the text while it is written: logits processors and stopping criteria. They get hidden tokens first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)


# Criteria that read no more than the last token, the length or the clock. transformers looks for them by name.
LAST_TOKEN = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)


def _hidden_first(ids: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return ids, (rows, length), with the prompt's columns of each row in an order, int64 (prompts, width)."""
    order, width = order.repeat_interleave(len(ids) // len(order), dim=0), order.shape[1]
    return torch.cat([ids[:, :width].gather(1, order), ids[:, width:]], dim=1)


class _Processor(LogitsProcessor):
    def __init__(self, inner: LogitsProcessorList, order: torch.Tensor) -> None:
        self._inner, self._order = inner, order

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self._inner(_hidden_first(input_ids, self._order), scores)  # type: ignore[arg-type]


class _Criterion(StoppingCriteria):
    def __init__(self, inner: StoppingCriteria, order: torch.Tensor) -> None:
        self._inner, self._order = inner, order

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._inner(_hidden_first(input_ids, self._order), scores, **kwargs)


class _Noted(StoppingCriteriaList):
    """Criteria that tell which rows have ended, bool (rows), and how many ids they had."""

    def __init__(self, criteria: Iterable[StoppingCriteria], note: Callable[[torch.Tensor, int], None]) -> None:
        super().__init__(criteria)
        self._note = note

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        done = super().__call__(input_ids, scores, **kwargs)  # type: ignore[arg-type]
        self._note(done, input_ids.shape[1])
        return done


def noted(inner: StoppingCriteriaList, note: Callable[[torch.Tensor, int], None]) -> StoppingCriteriaList:
    """Return criteria that call `note` with the rows that have ended, and the length of the ids.

    Without a criterion of end tokens transformers pads no row, and they are returned as they are.
    """
    return _Noted(inner, note) if any(hasattr(one, "eos_token_id") for one in inner) else inner


def processors(inner: LogitsProcessorList, order: torch.Tensor | None) -> LogitsProcessorList:
    """Return processors that read each row as if its hidden tokens stood before the others.

    So what begins at the prompt's last column, such as guidance or a watermark, begins at the row's last token.

    Args:
        order: int64 (prompts, width), or None to return them as they are.
    """
    return inner if order is None or not inner else LogitsProcessorList([_Processor(inner, order)])


def criteria(inner: Iterable[StoppingCriteria], order: torch.Tensor | None) -> StoppingCriteriaList:
    """Return stopping criteria that read each row in the same way."""
    return StoppingCriteriaList(
        one if order is None or isinstance(one, LAST_TOKEN) else _Criterion(one, order) for one in inner
    )
