"""torch's threads, held to one while onnxruntime computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


_lock = threading.Lock()
_users = 0
_threads_before = 1


@contextmanager
def single_torch_thread() -> Iterator[None]:
    """Hold torch to one thread, and restore the number that the first of several users found.

    torch's OpenMP threads, which a copy of 65,536 numbers is enough to wake, and onnxruntime's spinning ones would fight for
    the cores: the session itself takes twice the time.
    """
    global _users, _threads_before
    with _lock:
        if _users == 0:
            _threads_before = torch.get_num_threads()
        _users += 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
        # OpenMP keeps the number for each thread: whoever enters later in another thread sets its own to one.
        torch.set_num_threads(_threads_before)
