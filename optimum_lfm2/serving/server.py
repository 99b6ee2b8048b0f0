"""`optimum-cli lfm2 serve`: transformers' own server around exported folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers.cli.serving.server import build_server

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.engine import StoppedError
from optimum_lfm2.runtime.scheduler import Limits, QueueFullError
from optimum_lfm2.serving.folder import Loaded, load_folder
from optimum_lfm2.serving.guard import Guard, error_body
from optimum_lfm2.serving.handlers import (
    Bounds,
    ModelFailedError,
    Served,
    ServedChats,
    ServedCompletions,
    ServedResponses,
)
from optimum_lfm2.serving.manager import GoneError
from optimum_lfm2.serving.models import Models, State


SERVED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
NO_OBJECT = "The body is no JSON object in UTF-8, or the header Content-Type does not say application/json."


@dataclass(frozen=True)
class Settings:
    """How to serve.

    Attributes:
        host, port: where to listen.
        key: the API key, or None.
        body: bytes of a request.
        bounds: what one request may ask for.
        limits: what the requests of a model may take together.
    """

    host: str
    port: int
    key: str | None
    body: int
    bounds: Bounds
    limits: Limits


def run_server(folders: Sequence[str], file_name: str | None, settings: Settings) -> None:
    """Load the folders and serve until SIGTERM or Ctrl-C. What runs then ends by itself, and nothing else is taken.

    Args:
        folders: as `load_all` takes them.

    Raises:
        Lfm2Error: a folder is no export of ours, or two have the same name.
    """
    loaded = load_all(folders, file_name)
    app, state = build_app(loaded, settings)
    config = uvicorn.Config(app, host=settings.host, port=settings.port, log_level="info")
    try:
        uvicorn.Server(config).run()
    finally:
        state.shutdown()


def load_all(folders: Sequence[str], file_name: str | None = None, session_options: Any = None) -> dict[str, Loaded]:
    """Load folders to serve, by their names.

    Args:
        folders: exported folders, each with a name before it if it has `=`, such as `small=lfm2_onnx`.
        file_name: the model's file in each, or None.
        session_options: onnxruntime's, or None.

    Raises:
        Lfm2Error: a folder is no export of ours, or two have the same name.
    """
    loaded: dict[str, Loaded] = {}
    for one in folders:
        name, folder = named(one)
        if name in loaded:
            raise Lfm2Error(f"Two folders have the name {name}. Give one another: NAME={folder}")
        loaded[name] = load_folder(folder, file_name, session_options)
    return loaded


def named(folder: str) -> tuple[str, Path]:
    """Return the name of a model and its folder. Raise `Lfm2Error` where one of them is empty."""
    name, given, path = folder.partition("=")
    if not folder or (given and not Path(folder).exists()):
        if not name or not path:
            raise Lfm2Error(f'"{folder}" names no model. Give FOLDER or NAME=FOLDER.')
        return name, Path(path)
    return Path(folder).resolve().name, Path(folder)


def build_app(loaded: Mapping[str, Loaded], settings: Settings) -> tuple[Any, State]:
    """Return the ASGI application, and what has to be shut down after it."""
    models, state = Models(loaded), State(loaded, settings.limits)
    handlers: list[Served] = [kind(models, state) for kind in (ServedChats, ServedCompletions, ServedResponses)]
    for handler in handlers:
        handler.bounds = settings.bounds
    chats, completions, responses = handlers
    app = build_server(models, chats, completions, responses, None, None, state)
    # The others load and unload models, or are of models that are not ours.
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in SERVED]
    _answer_errors(app)
    return Guard(app, settings.key, settings.body), state


def _answer_errors(app: FastAPI) -> None:
    """Give every error OpenAI's form."""

    def answer(status: int, message: str, code: str | None = None) -> JSONResponse:
        wait = {"Retry-After": "1"} if status == 503 else None
        return JSONResponse(error_body(status, message, code), status, headers=wait)

    @app.exception_handler(QueueFullError)
    @app.exception_handler(StoppedError)
    async def busy(_: Any, error: Exception) -> JSONResponse:
        return answer(503, str(error), "overloaded")

    @app.exception_handler(Lfm2Error)
    async def wrong(_: Any, error: Exception) -> JSONResponse:
        return answer(400, str(error))

    @app.exception_handler(HTTPException)
    async def refused(_: Any, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), "model_not_found" if error.status_code == 404 else None)

    @app.exception_handler(AnyHTTPException)  # of a body that is no text, or is nested too deep
    async def unreadable(_: Any, error: AnyHTTPException) -> JSONResponse:
        return answer(error.status_code, NO_OBJECT if error.status_code == 400 else str(error.detail))

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def absent(_: Any, error: Any) -> JSONResponse:
        known = error.detail if "model" in str(error.detail) else f"This server has {', '.join(SERVED)}."
        return answer(error.status_code, known)

    @app.exception_handler(RequestValidationError)
    async def unread(_: Any, error: RequestValidationError) -> JSONResponse:
        return answer(400, NO_OBJECT)

    @app.exception_handler(GoneError)
    async def gone(_: Any, error: Exception) -> JSONResponse:
        return answer(499, "The client went away.")  # nobody reads it

    @app.exception_handler(ModelFailedError)
    async def failed(_: Any, error: Exception) -> JSONResponse:
        return answer(500, str(error))

    @app.exception_handler(Exception)
    async def unknown(_: Any, error: Exception) -> JSONResponse:
        return answer(500, f"The server failed ({type(error).__name__}).")
