"""transformers' warning of right padding, which does not hold for our model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def right_padding_allowed() -> Iterator[None]:
    """Drop what `generate` says about right padding in the calling thread; other threads hear it as before.

    Its text is that of transformers 4.57 and 5.24; a test fails where a release words it otherwise.
    """
    thread = threading.get_ident()

    def wanted(record: logging.LogRecord) -> bool:
        return record.thread != thread or "right-padding was detected" not in str(record.msg)

    logger = logging.getLogger("transformers.generation.utils")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
