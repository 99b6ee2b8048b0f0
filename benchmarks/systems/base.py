"""The interface of a system that is measured."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Timing:
    """The tokens of a greedy continuation, and the clock in seconds at the start and after each token."""

    tokens: list[int] = field(default_factory=list)
    stamps: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def add(self, token: int) -> None:
        self.stamps.append(time.perf_counter())
        self.tokens.append(token)

    @property
    def prefill(self) -> float:
        """The seconds until the first token."""
        return self.stamps[1] - self.stamps[0]

    @property
    def decode(self) -> float:
        """The seconds from the first token to the last."""
        return self.stamps[-1] - self.stamps[1]

    @property
    def typical_step(self) -> float:
        """The median of the seconds between two tokens."""
        return statistics.median(after - before for before, after in itertools.pairwise(self.stamps[1:]))


class System:
    """A system that decodes step by step. A system that has only a `generate` overrides `run` instead."""

    def logits(self, ids: list[int]) -> np.ndarray:
        """The logits at each of `ids`, read from an empty cache, (length, vocabulary)."""
        raise NotImplementedError

    def start(self, ids: list[int]) -> int:
        """Start anew, read the prompt, and return the first token."""
        raise NotImplementedError

    def step(self, token: int) -> int:
        """Read one token and return the next one."""
        raise NotImplementedError

    def run(self, ids: list[int], new: int) -> Timing:
        """Generate the first token and `new` more, greedily. No token ends the text."""
        timing = Timing()
        token = self.start(ids)
        timing.add(token)
        for _ in range(new):
            token = self.step(token)
            timing.add(token)
        return timing


class Stamps:
    """A streamer for transformers that notes the time of each token."""

    def __init__(self) -> None:
        self.timing = Timing()
        self.prompt_seen = False

    def put(self, value) -> None:
        if self.prompt_seen:
            self.timing.add(int(value))
        self.prompt_seen = True

    def end(self) -> None:
        pass


def forward_logits(model, ids: list[int]) -> np.ndarray:
    """`System.logits` for whatever has transformers' forward."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def run_generate(model, ids: list[int], new: int) -> Timing:
    """Implement `System.run` for a model that has transformers' `generate`."""
    import torch

    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    inputs = torch.tensor([ids], device=model.device)
    stamps = Stamps()
    model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new + 1, do_sample=False, streamer=stamps
    )
    return stamps.timing
