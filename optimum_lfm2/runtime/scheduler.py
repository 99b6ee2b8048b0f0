"""Requests share calls: each call gives every running row one token, whatever its length. It knows nothing of HTTP.

A request waits until it fits, then its prompt is read in chunks between the steps of the others, then its row joins
them, and leaves when its text ends. What was read stays for texts that begin in the same way.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from optimum.utils import logging

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.layout import GraphLayout
from optimum_lfm2.runtime.picking import Picker
from optimum_lfm2.runtime.prefixes import Prefixes, Tensors
from optimum_lfm2.runtime.rows import PREFILL_CHUNK
from optimum_lfm2.runtime.session import GraphSession
from optimum_lfm2.runtime.shared_rows import SharedRows


CHUNK_BESIDE_OTHERS = 128  # tokens of a prompt that are read while other rows wait for their next token
CANCELLED, FAILED = "cancelled", "failed"  # how a request ends besides `picking.STOP` and `LENGTH`

logger = logging.get_logger(__name__)


class QueueFullError(Lfm2Error):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Limits:
    """What requests may take together.

    Attributes:
        rows: how many run at once.
        tokens: rows times columns, prompts and answers. Each row has as many columns as the longest will have.
        queue: how many wait.
        cache_memory: bytes for what was read before.
    """

    rows: int = 16
    tokens: int = 32768
    queue: int = 256
    cache_memory: int = 512 * 2**20


class ScheduledRequest:
    """A text to go on with.

    Args:
        ids: the prompt, int64 (length).
        picker: chooses its tokens.
        on_token: called with each new token. What it raises ends this request.
        on_end: called once at the end.
        key: the prompt for comparison with others, int64 (length); by default the ids. The numbers of a picture's
            tokens have to depend on what it shows.
        graph: makes the session that reads pictures in the prompt. It is called when their turn comes.
        read_ids: what that session takes in the place of `ids`.

    Attributes:
        columns: how many tokens it has at the end, if nothing ends it before.
        tokens: the new tokens.
        ended: None, or how it ended: "stop", "length", "cancelled", "failed".
        error: what failed.
        cached: how many tokens of the prompt had been read before.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        picker: Picker,
        on_token: Callable[[int], object] = lambda token: None,
        on_end: Callable[[], object] = lambda: None,
        key: np.ndarray | None = None,
        graph: Callable[[], GraphSession] | None = None,
        read_ids: torch.Tensor | None = None,
    ) -> None:
        self.ids, self.picker, self._make_graph = ids, picker, graph
        self.read_ids = ids if read_ids is None else read_ids
        self.key = ids.numpy() if key is None else key
        self.columns = len(ids) + picker.max_new_tokens  # kept, since each step asks for it
        self._on_token, self._on_end = on_token, on_end
        self.tokens: list[int] = []
        self.ended: str | None = None
        self.error: Exception | None = None
        self.cached = 0
        self.cancelled = False
        self._session: GraphSession | None = None
        # The states at some points of the prompt, by the number of tokens before them.
        self.points: dict[int, Tensors] = {}

    def graph(self, plain: GraphSession, start: int, end: int) -> GraphSession:
        """Return the session that reads these tokens of the prompt: `plain`, where no picture is among them."""
        if self._make_graph is None or torch.equal(self.ids[start:end], self.read_ids[start:end]):
            return plain
        if self._session is None:
            self._session = self._make_graph()
        return self._session

    def cancel(self) -> None:
        """Let the scheduler drop it at its next step. Any thread may call it."""
        self.cancelled = True

    def take(self, logits: np.ndarray) -> None:
        """Choose the next token from logits, float (vocab_size), and end where the text does."""
        token = self.picker.pick(logits)
        self.tokens.append(token)
        self._on_token(token)
        reason = self.picker.ended()
        if reason is not None:
            self.end(reason)

    def end(self, reason: str, error: Exception | None = None) -> None:
        """End it once."""
        if self.ended is not None:
            return
        self.ended, self.error = reason, error
        try:
            self._on_end()
        except Exception as failure:  # the caller's own; other requests must not see it
            logger.error(f"What waits for the end of a request failed: {type(failure).__name__}: {failure}")

    def read(self) -> np.ndarray:
        """The key of all tokens but the last, which the graph has not seen."""
        return np.concatenate([self.key, np.array(self.tokens[:-1], dtype=np.int64)])


class Scheduler:
    """Runs requests in shared calls. One thread calls `step`; any may call `submit`.

    Args:
        graph: the session. Its graph takes padded rows, and writes keys and values in place (see `can_schedule`).
        layout: the graph's signature.
        device: where it runs.
        limits: what requests may take together.
    """

    def __init__(self, graph: GraphSession, layout: GraphLayout, device: torch.device, limits: Limits) -> None:
        self._graph, self._layout, self._limits = graph, layout, limits
        self._rows = SharedRows(layout, device, limits.rows)
        self._running: list[ScheduledRequest] = []  # in the order of the rows
        self._waiting: deque[ScheduledRequest] = deque()
        self._lock = threading.Lock()  # of those that wait
        self._reading: tuple[ScheduledRequest, Lfm2Cache, int] | None = None
        self.prefixes = Prefixes(layout, limits.cache_memory)

    @property
    def running(self) -> int:
        """How many requests run or read their prompt."""
        return len(self._running) + (self._reading is not None)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._running or self._waiting or self._reading)

    def check(self, request: ScheduledRequest) -> None:
        """Raise `Lfm2Error` for a request that would never fit, and for one whose prompt is empty."""
        if not len(request.ids):
            raise Lfm2Error("The prompt is empty. Give one token at least.")
        if request.columns > self._limits.tokens:
            raise Lfm2Error(
                f"The prompt has {len(request.ids)} tokens and asks for {request.picker.max_new_tokens} more; all "
                f"requests together may have {self._limits.tokens}. Ask for fewer."
            )

    def submit(self, request: ScheduledRequest) -> None:
        """Let a request wait for its turn.

        Raises:
            QueueFullError: as many wait as may.
            Lfm2Error: it would never fit.
        """
        self.check(request)
        with self._lock:
            if len(self._waiting) >= self._limits.queue:
                raise QueueFullError(f"{len(self._waiting)} requests wait already. Try again later.")
            self._waiting.append(request)

    def step(self) -> None:
        """Read one chunk of a prompt, and give each running row one token."""
        self._drop_cancelled()
        self._admit()
        self._read_chunk()
        self._give_tokens()

    def end_all(self, reason: str, error: Exception | None = None) -> None:
        """End every request."""
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
        reading = [self._reading[0]] if self._reading else []
        self._reading = None
        for request in (*self._running, *reading, *waiting):
            request.end(reason, error)
        self._remove_ended(keep=False)

    def _drop_cancelled(self) -> None:
        with self._lock:
            dropped = [request for request in self._waiting if request.cancelled]
        for request in dropped:
            request.end(CANCELLED)
            with self._lock:
                self._waiting.remove(request)
        if self._reading is not None and self._reading[0].cancelled:
            self._reading[0].end(CANCELLED)
            self._reading = None
        for request in self._running:
            if request.cancelled:
                request.end(CANCELLED)
        self._remove_ended()

    def _admit(self) -> None:
        """Begin to read the prompt of the request that waits longest, if it fits beside what runs."""
        if self._reading is not None or not self._waiting or len(self._running) >= self._limits.rows:
            return
        request = self._waiting[0]
        longest = max(one.columns for one in (*self._running, request))
        if self._running and (len(self._running) + 1) * longest > self._limits.tokens:
            return
        cache, parting = self.prefixes.resume(request.key, self._graph, len(request.ids))
        request.cached = cache.length
        self._reading = request, cache, parting  # before it leaves the queue: who looks from outside must not miss it
        with self._lock:
            self._waiting.popleft()

    def _read_chunk(self) -> None:
        if self._reading is None:
            return
        request, cache, parting = self._reading
        start, length = cache.length, len(request.ids)
        end = min(length, start + (CHUNK_BESIDE_OTHERS if self._running else PREFILL_CHUNK))
        if start < parting < end:
            end = parting
        ids, mask = request.read_ids[None, start:end], torch.ones((1, end), dtype=torch.int64)
        try:
            logits = request.graph(self._graph, start, end).run(ids, mask, cache, 1, True)
            if end < length:
                self._note_point(request, cache, parting)
                return
            self.prefixes.keep(request.key, cache.tensors, request.points)
            request.take(logits.cpu().numpy()[0, -1])
            if request.ended is None:
                self._rows.enter(cache, max(one.columns for one in (*self._running, request)))
                self._running.append(request)
            self._reading = None
        except Exception as error:
            self._reading = None
            self._fail(request, error)

    def _note_point(self, request: ScheduledRequest, cache: Lfm2Cache, parting: int) -> None:
        """Keep the states, where prompts part and where they cost little."""
        last, spacing = max(request.points, default=request.cached), self.prefixes.spacing
        if cache.length == parting or (spacing and cache.length - last >= spacing):
            request.points[cache.length] = {
                state.past: cache.tensors[state.past].clone() for state in self._layout.states
            }

    def _give_tokens(self) -> None:
        if not self._running:
            return
        rows = self._rows
        if rows.length + 1 > max(request.columns for request in self._running):
            rows.compact()  # a longer row has left
        ids = torch.from_numpy(np.array([[request.tokens[-1]] for request in self._running], dtype=np.int64))
        try:
            logits = self._graph.run(ids, rows.new_mask(), rows, 1, True)
            found: list[np.ndarray | Exception] = [*logits.cpu().numpy()[:, -1]]
        except Exception as error:  # of whose row, the call does not say
            logger.warning(f"A shared call failed, so its rows run one by one: {error}")
            found = self._run_one_by_one(ids)
        rows.count_tokens()
        for request, row in zip(self._running, found, strict=True):
            try:
                if isinstance(row, Exception):
                    raise row
                request.take(row)
            except Exception as error:  # noqa: PERF203  a row's error is its own
                self._fail(request, error)
        self._remove_ended()

    def _run_one_by_one(self, ids: torch.Tensor) -> list[np.ndarray | Exception]:
        """Run each row alone, in the same columns, and return its logits (vocab_size) or what it raised."""
        rows, mask = self._rows, self._rows.new_mask()
        found: list[np.ndarray | Exception] = []
        for i in range(len(ids)):
            try:
                logits = self._graph.run(ids[i : i + 1], mask[i : i + 1], rows.row(i), 1, True)
                found.append(logits.cpu().numpy()[0, -1])
            except Exception as error:  # noqa: PERF203  as above
                found.append(error)
        rows.swap()
        rows.length += 1
        return found

    def _fail(self, request: ScheduledRequest, error: Exception) -> None:
        logger.error(f"A request failed: {type(error).__name__}: {error}")
        request.end(FAILED, error)

    def _remove_ended(self, keep: bool = True) -> None:
        """Let rows that have ended leave, from the last on, and keep what they read."""
        for i in reversed(range(len(self._running))):
            request = self._running[i]
            if request.ended is None:
                continue
            if keep and request.ended != FAILED and self._limits.cache_memory:
                self.prefixes.keep(request.read(), self._rows.copy_of(i), request.points)
            self._rows.leave(i)
            self._running[i] = self._running[-1]
            del self._running[-1]


def can_schedule(layout: GraphLayout) -> bool:
    """Return whether a graph's rows can share calls. Those of other exporters may be wrong on padded rows."""
    return bool(layout.caches) and layout.any_padding and layout.in_place
