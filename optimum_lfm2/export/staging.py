"""Write a folder as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.file_names import QUANTIZED_CACHE


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Make an empty folder, and move its files into `output` when the `with` block ends without an error.

    The folder is on the file system of `output`. Files of the same name are replaced, and others in `output` stay. One
    exception: with a replaced graph goes the graph with a quantised cache that was made of it. If the block fails or is
    interrupted, by SIGTERM too, `output` stays as it was.

    Yields:
        The empty folder.

    Raises:
        Lfm2Error: `output` is a file, or another export writes to it.
        OSError: the folder cannot be written.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100  resolve() would follow a link and replace its target's folder
    if output.exists() and not output.is_dir():
        raise Lfm2Error(f"{output} is a file. Give another folder to write to.")
    created = [folder for folder in output.parents if not folder.exists()]
    with terminable():
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            place = _place(output)
            # Named before it is made: a signal between the two must not leave it behind.
            folder = place / f".{output.name}.{secrets.token_hex(4)}"
            with _alone(place, output):
                try:
                    new, old = folder / "new", folder / "old"
                    new.mkdir(parents=True)
                    yield new
                    _move(new, old, output)
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
        except BaseException:
            for parent in created:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()
            raise


def _place(output: Path) -> Path:
    """Return the folder to stage in, from which a move into `output` is a rename.

    It is the one beside `output`, or `output` itself if that is a mounted volume.
    """
    if not output.exists():
        return output.parent
    mounted = output.stat().st_dev != output.parent.stat().st_dev
    return output if mounted or not os.access(output.parent, os.W_OK) else output.parent


@contextmanager
def _alone(place: Path, output: Path) -> Iterator[None]:
    """Let nobody else write to `output`. The system frees the lock of a process that dies."""
    # By the folder's own name, whatever links lead to it: two exports that reach it by two names are two.
    real = output.resolve()
    lock = FileLock((output if place == output else real.parent) / f".{real.name}.lock", timeout=0)
    try:
        with _uninterrupted():
            try:
                lock.acquire()
            except Timeout:
                raise Lfm2Error(
                    f"Another export writes to {output} now. Wait for it, or give another folder."
                ) from None
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                Path(lock.lock_file).unlink()  # before it is free: nobody's else can be in the way
            lock.release()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold signals back within the `with` block, so that none comes between making a file and noting that it exists."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _move(new: Path, old: Path, output: Path) -> None:
    """Move every file of `new` into `output`. Replaced files wait in `old`, and come back if a move fails."""
    existed = output.exists()
    undo: list[tuple[Path, Path]] = []
    try:
        for source in sorted(path for path in new.rglob("*") if not path.is_dir()):
            name = source.relative_to(new)
            if (output / name).exists() or (output / name).is_symlink():
                _rename(output / name, old / name, undo)
                stale = name.with_name(f"{name.stem}{QUANTIZED_CACHE}.onnx")  # over weights that go, too
                if name.suffix == ".onnx" and (output / stale).exists():
                    _rename(output / stale, old / stale, undo)
            _rename(source, output / name, undo)
    except BaseException:
        for source, target in reversed(undo):
            target.replace(source)
        if not existed:
            shutil.rmtree(output, ignore_errors=True)
        raise


def _rename(source: Path, target: Path, undo: list[tuple[Path, Path]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    undo.append((source, target))


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack within the `with` block, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
