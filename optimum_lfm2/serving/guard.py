"""What stands before the server: the key, the size of a body, and whether the client is still there."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any


OPEN = ("/health",)  # what needs no key
# Set once the client of the running request has gone away.
GONE: ContextVar[asyncio.Event | None] = ContextVar("gone", default=None)


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Guard:
    """An ASGI application around another.

    Args:
        app: what it lets requests through to.
        key: what `Authorization: Bearer` has to say, or None.
        most: bytes of a body.
    """

    def __init__(self, app: Any, key: str | None, most: int) -> None:
        self._app, self._key, self._most = app, key, most

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._key is not None and scope["path"] not in OPEN and not self._knows(headers.get(b"authorization", b"")):
            await _refuse(send, 401, "The API key is missing or wrong.", "invalid_api_key")
            return
        body = await self._body(receive)
        if body is None:
            await _refuse(send, 413, f"The body has more than {self._most} bytes.", "body_too_large")
            return
        gone = asyncio.Event()
        GONE.set(gone)
        watcher: list[asyncio.Task] = []
        try:
            await self._app(scope, _replayed(body, receive, gone, watcher), send)
        finally:
            for task in watcher:
                task.cancel()

    def _knows(self, given: bytes) -> bool:
        return hmac.compare_digest(given, f"Bearer {self._key}".encode())

    async def _body(self, receive: Any) -> bytes | None:
        """Return the whole body, or None where it is too long."""
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                break  # gone already
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self._most:
                parts = []  # the rest is read and dropped, so that the client gets to read the answer
            if size > 8 * self._most:
                break
        return b"".join(parts) if size <= self._most else None


def _replayed(
    body: bytes, receive: Any, gone: asyncio.Event, watcher: list[asyncio.Task]
) -> Callable[[], Awaitable[dict[str, Any]]]:
    """Return a `receive` that gives the body, and then says when the client goes away."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    async def replay() -> dict[str, Any]:
        if not watcher:
            watcher.append(asyncio.create_task(watch()))
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    return replay


async def _refuse(send: Any, status: int, message: str, code: str) -> None:
    text = json.dumps(error_body(status, message, code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
