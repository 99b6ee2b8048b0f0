"""Generation for transformers' server: requests go to the scheduler, and their tokens come back as text."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    DirectStreamer,
    _GenerationCancelled,
    _StreamError,
    response_events_to_chunks,
)

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.engine import Engine
from optimum_lfm2.runtime.picking import Picker, can_share
from optimum_lfm2.runtime.scheduler import FAILED, Limits, QueueFullError, ScheduledRequest, Scheduler, can_schedule
from optimum_lfm2.runtime.vision_checks import unfilled
from optimum_lfm2.serving.guard import GONE
from optimum_lfm2.vision_modeling import VisionModel


class GoneError(Exception):
    """The client went away."""


@dataclass
class Extras:
    """What a request asks for beside a `GenerationConfig`.

    Attributes:
        seed: of its generator, or None.
        processors: its logits processors.
    """

    seed: int | None = None
    processors: list[Any] = field(default_factory=list)


class TokenStream(DirectStreamer):
    """Turns the tokens of a request into what the handlers send: text, reasoning, tool calls.

    It ends the text before a stop string. transformers 5.24's own class fails on a list of tool calls, which is what
    `python-call-list` gives; until it does not, `_items` makes single ones of it.
    """

    def __init__(
        self, tokenizer: Any, loop: Any, queue: Any, parser: Any, stops: list[str], cancel: Callable[[], object]
    ) -> None:
        super().__init__(tokenizer, loop, queue, response_parser=parser)
        self._stops, self._on_cancel = stops, cancel
        self._parser = parser
        self._first = True
        self.tokens: list[int] = []
        self._held = ""  # may be the beginning of a stop string
        self._unsent = ""  # what the parser has taken since it gave something
        self._stopped = False
        self.error: Exception | None = None

    def take(self, token: int) -> None:
        """Take a new token."""
        self.tokens.append(token)
        self.total_tokens += 1
        text = self._decode_stream.step(self._tokenizer, token)
        if text is not None and not self._stopped:
            self._feed(self._before_stop(text))

    def put(self, value: torch.Tensor) -> None:
        """Take new tokens from `generate`, whose first call has the prompt."""
        if self._cancelled.is_set():
            raise _GenerationCancelled
        if self._first:
            self._first = False
            return
        for token in value.flatten().tolist():
            self.take(token)

    def end(self) -> None:
        """Send what is left, and the end."""
        if not self._stopped:
            self._feed(self._held)
        if self._parser is not None:
            try:
                self._send(self._parser.finalize()[1])
            except (ValueError, RuntimeError):  # the text ended within a tool call
                self._enqueue(self._unsent)
        self._enqueue(None)

    def fail(self, error: Exception) -> None:
        """Send an error in the place of the end."""
        self.error = error
        # The handlers put the message between quotes.
        self._enqueue(_StreamError(json.dumps(describe(error))[1:-1]))

    def cancel(self) -> None:
        """The client has gone away."""
        super().cancel()
        self._on_cancel()

    def _before_stop(self, text: str) -> str:
        """Return what can be sent: no stop string, and nothing that may become one."""
        text = self._held + text
        self._held = ""
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._stopped = True
            return text[: min(found)]
        most = max(
            (length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length])),
            default=0,
        )
        if most:
            self._held = text[-most:]
            return text[:-most]
        return text

    def _feed(self, text: str) -> None:
        if not text:
            return
        if self._parser is None:
            self._enqueue(text)
            return
        self._unsent += text
        try:
            self._send(self._parser.feed(text))
        except ValueError:  # a tool call that is none: its text goes on as it is
            self._parser = None
            self._enqueue(self._unsent)

    def _send(self, events: list[dict]) -> None:
        for event in events:
            for item in response_events_to_chunks(_items(event)):
                self._unsent = ""
                self._enqueue(item)


def _items(event: dict) -> list[dict]:
    """Return an event for each of several tool calls in one."""
    value = event.get("value")
    if event["type"] != "region_close" or not isinstance(value, list):
        return [event]
    return [{**event, "value": one} for one in value]


async def _end_when(gone: asyncio.Event, queue: asyncio.Queue) -> None:
    """Let who waits for a queue know that the client went away."""
    await gone.wait()
    queue.put_nowait(GoneError)


def describe(error: Exception) -> str:
    """Return an error for a client: one line."""
    if isinstance(error, Lfm2Error):
        return str(error)
    return f"The model failed ({type(error).__name__}): {' '.join(str(error).split())[:200]}"


class SharedManager(BaseGenerateManager):
    """Runs the requests of one model in shared calls.

    Those that need calls of their own, such as beams, run beside them, one after another.

    Args:
        model: an `ORTLfm2ForCausalLM`, or the class that sees.
        tokenizer: its tokenizer.
        limits: what requests may take together.
    """

    def __init__(self, model: Any, tokenizer: Any, limits: Limits) -> None:
        self._model, self._tokenizer, self._limits = model, tokenizer, limits
        self.engine: Engine | None = None
        if can_schedule(model.layout):
            self.engine = Engine(Scheduler(model._graph, model.layout, model.device, limits))
        self._alone = ThreadPoolExecutor(1, thread_name_prefix="lfm2-alone")
        self._alone_count = 0
        self._stopped = False

    def is_alive(self) -> bool:
        """Whether it takes requests."""
        return not self._stopped and (self.engine is None or self.engine.alive)

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, TokenStream]:
        """Start a request. Return the queue of what it gives, and its stream.

        Raises:
            Lfm2Error: it does not fit, or as many wait as may.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue = asyncio.Queue()
        stops = [gen_config.stop_strings] if isinstance(gen_config.stop_strings, str) else gen_config.stop_strings or []
        stream = TokenStream(self._tokenizer._tokenizer, loop, queue, response_parser, list(stops), lambda: None)
        self._start(inputs, gen_config, stream)
        return queue, stream

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Run a request. Return its text, the length of the prompt, and its tokens.

        Raises:
            GoneError: the client went away, so it was cancelled.
            Lfm2Error: it does not fit, or as many wait as may.
        """
        queue, stream = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        pieces, gone = [], GONE.get()
        watcher = None if gone is None else asyncio.create_task(_end_when(gone, queue))
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, _StreamError):
                    if isinstance(stream.error, Lfm2Error):
                        raise stream.error
                    raise RuntimeError(json.loads(f'"{item.msg}"'))
                if item is GoneError:
                    raise GoneError
                pieces.append(item)
        except (GoneError, asyncio.CancelledError):
            stream.cancel()
            raise
        finally:
            if watcher is not None:
                watcher.cancel()
        return "".join(pieces), inputs["input_ids"].shape[-1], stream.tokens

    def stop(self) -> None:
        """Refuse further requests, and wait for those that run."""
        self._stopped = True
        if self.engine is not None:
            self.engine.stop()
        self._alone.shutdown()

    def _start(self, inputs: Any, config: GenerationConfig, stream: TokenStream) -> None:
        extras: Extras = config.__dict__.pop("extras", None) or Extras()  # a matcher of a grammar cannot be copied
        if self.engine is None or not can_share(config):
            self._start_alone(inputs, config, extras, stream)
            return
        ids = inputs["input_ids"][0]
        picker = Picker(self._model, ids, config, self._tokenizer, extras.seed, extras.processors)

        def end() -> None:
            stream.fail(request.error) if request.ended == FAILED else stream.end()  # type: ignore[arg-type]

        request = ScheduledRequest(ids, picker, stream.take, end, **self._pictures(ids, inputs))
        stream._on_cancel = request.cancel
        self.engine.submit(request)

    def _pictures(self, ids: torch.Tensor, inputs: Any) -> dict[str, Any]:
        """Return the further arguments of a request with pictures."""
        shown = self._model.shown(inputs) if isinstance(self._model, VisionModel) else {}
        if not shown:
            return {}
        places = {medium: self._model.places(ids, medium) for medium in shown}
        digest = hashlib.blake2b(digest_size=6)
        for given in self._model.checked(shown).values():
            for tensor in given.values():
                digest.update(tensor.numpy().tobytes())
        # Numbers that no token has, and no other pictures.
        key, base = ids.numpy().copy(), int.from_bytes(digest.digest(), "big") << 12
        numbered, first, seen = ids.clone(), self._model.config.get_text_config().vocab_size, 0
        for own in places.values():
            number = seen + torch.arange(int(own.sum()))
            key[own.numpy()] = -(base + 1 + number.numpy())
            numbered[own] = first + number
            seen += len(number)

        def graph() -> Any:
            features = self._model.features_of(shown)
            for medium, rows in features.items():
                if len(rows) != (count := int(places[medium].sum())):
                    raise Lfm2Error(unfilled(medium, count, len(rows)))
            return self._model._graph.with_features(torch.cat(list(features.values())))

        return {"key": key, "graph": graph, "read_ids": numbered}

    def _start_alone(self, inputs: Any, config: GenerationConfig, extras: Extras, stream: TokenStream) -> None:
        if self._alone_count >= self._limits.queue:
            raise QueueFullError(f"{self._alone_count} requests wait already. Try again later.")
        self._alone_count += 1

        def run() -> None:
            try:
                if extras.seed is not None:
                    torch.manual_seed(extras.seed)
                given = {"generation_config": config, "tokenizer": self._tokenizer}
                if config.num_beams in (None, 1):
                    self._model.generate(**inputs, **given, streamer=stream, logits_processor=extras.processors)
                else:  # beams stream nothing
                    out = self._model.generate(**inputs, **given, logits_processor=extras.processors)
                    for token in out[0, inputs["input_ids"].shape[1] :].tolist():
                        stream.take(token)
                    stream.end()
            except _GenerationCancelled:
                stream._enqueue(None)
            except Exception as error:
                stream.fail(error)
            finally:
                self._alone_count -= 1

        self._alone.submit(run)
