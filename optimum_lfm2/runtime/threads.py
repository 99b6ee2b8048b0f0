"""torch's threads, held to one while onnxruntime computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_torch_thread() -> Iterator[None]:
    """Hold torch to one thread in the calling thread, and restore its number at the end.

    Otherwise torch's OpenMP threads, which even a copy of the logits wakes, compete with onnxruntime's spinning threads
    for the cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # OpenMP has a number for each thread, and torch one for threads that start later. The latter stays as it was.
    elsewhere = threading.Thread(target=torch.set_num_threads, args=(before,))
    elsewhere.start()
    elsewhere.join()
    try:
        yield
    finally:
        torch.set_num_threads(before)
