"""The thread in which a scheduler runs."""

from __future__ import annotations

import threading

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.scheduler import CANCELLED, FAILED, ScheduledRequest, Scheduler
from optimum_lfm2.runtime.threads import single_torch_thread


class StoppedError(Lfm2Error):
    """The engine takes no request any more."""


class Engine:
    """Runs a scheduler in a thread of its own, which sleeps while there is nothing to do. Any thread may submit.

    Args:
        scheduler: nobody else may call its `step`.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="lfm2-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, request: ScheduledRequest) -> None:
        """Let a request wait for its turn.

        Raises:
            QueueFullError: as many wait as may.
            StoppedError: it was told to stop.
            Lfm2Error: the request would never fit.
        """
        with self._wake:
            if not self.alive:
                raise StoppedError("The server is shutting down.")
            self.scheduler.submit(request)
            self._wake.notify()

    def stop(self, finish: bool = True, timeout: float | None = None) -> None:
        """Refuse further requests, and wait until the thread has ended.

        Args:
            finish: whether requests that run or wait may end by themselves. Otherwise they are cancelled.
            timeout: seconds to wait at most.
        """
        with self._wake:
            self._stopping = True
            self._finish = finish
            self._wake.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        scheduler = self.scheduler
        with single_torch_thread():
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._stopping or not scheduler.idle)
                    if self._stopping and (scheduler.idle or not self._finish):
                        scheduler.end_all(CANCELLED)
                        return
                try:
                    scheduler.step()
                except Exception as error:  # of no request: what they hold cannot be trusted any more
                    scheduler.end_all(FAILED, error)
