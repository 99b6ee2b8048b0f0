"""Run several forwards of one model together, unit by unit, so that each weight is read once for all of them.

Each forward has a thread, in which transformers' own code runs. A thread stops where its forward comes to a unit of the
model (the embedding, a layer, the final norm, the head). The calling thread reads the unit's weights, runs the unit for
every forward in turn, and drops the weights. So the threads are coroutines, and one of them runs at a time.

The calling thread does all the heavy work. torch gives each thread that computes in parallel a pool of OpenMP threads.
Once these are more than the cores, libgomp puts them to sleep between operations, and quantising a weight then took
three times as long (torch 2.13, two cores). So the threads of the forwards have no pool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from optimum_lfm2.validation.streamed import Loan, experts_one_by_one, loans


def run_together(model: Any, weights: Mapping[str, Any], jobs: Sequence[Callable[[], None]]) -> None:
    """Run jobs that each call `model` once, and read the weights once for all of them.

    A job sees its own context variables within the units too, although another thread runs them.

    Args:
        model: a model of transformers on the meta device. Buffers that no checkpoint stores hold their values.
        weights: the stored tensors by name, float32.
        jobs: functions that each run one forward.

    Raises:
        Exception: the error of the first job that failed.
    """
    units = {loan.unit: loan for loan in loans(model, weights)}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.enter_context(experts_one_by_one(model))
        for unit in units:
            stack.enter_context(_handed_over(unit))
        running = [_Running(job) for job in jobs]
        for job in running:
            stack.callback(job.stop)  # after a failure
        while running := [job for job in running if job.advance()]:
            _run_unit(units[running[0].unit], running)


def _run_unit(loan: Loan, waiting: Sequence[_Running]) -> None:
    """Run the unit for which all jobs wait."""
    loan.take()
    try:
        for job in waiting:
            job.run_unit()
    finally:
        loan.give_back()


class _Running:
    """A job in a thread of its own.

    Attributes:
        unit: the module for which the job waits.
    """

    current: ContextVar[_Running] = ContextVar("current")
    unit: torch.nn.Module

    def __init__(self, job: Callable[[], None]) -> None:
        self._requests: SimpleQueue[Future | BaseException | None] = SimpleQueue()
        self._answer: Future | None = None  # what the thread waits for
        self._call: Callable[[], Any]
        self._result: Any = None
        self._thread = Thread(target=self._work, args=(job,))

    def _work(self, job: Callable[[], None]) -> None:
        self.current.set(self)
        torch.set_num_threads(1)  # of this thread, and of those that start after it
        try:
            with torch.no_grad():  # torch has this setting for each thread
                job()
        except BaseException as error:
            self._requests.put(error)
        else:
            self._requests.put(None)

    def hand_over(self, unit: torch.nn.Module, call: Callable[[], Any]) -> Any:
        """Wait until the calling thread has run `call`, and return its result. The job's thread calls this."""
        self.unit, self._call = unit, functools.partial(copy_context().run, call)
        answer: Future = Future()
        self._requests.put(answer)
        return answer.result()

    def advance(self) -> bool:
        """Let the job go on to its next unit. Return whether there is one.

        Raises:
            Exception: the job's own error.
        """
        if self._answer is None:
            self._thread.start()
        else:
            self._answer.set_result(self._result)
        request = self._requests.get()
        self._answer = request if isinstance(request, Future) else None
        if isinstance(request, BaseException):
            raise request
        return request is not None

    def run_unit(self) -> None:
        """Run the unit. The job's thread gets the result when it goes on."""
        self._result = self._call()

    def stop(self) -> None:
        """End the job's thread, wherever it waits."""
        if self._answer is not None:
            self._answer.cancel()
        if self._thread.ident is not None:
            self._thread.join()


@contextmanager
def _handed_over(unit: torch.nn.Module) -> Iterator[None]:
    """Within the `with` block, a job that calls the module hands the call over to the calling thread."""
    own = unit.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _Running.current.get().hand_over(unit, functools.partial(own, *args, **kwargs))

    unit.forward = forward
    try:
        yield
    finally:
        del unit.forward
