"""Serve the chat page with a model: `python examples/web/serve.py FOLDER [--port 8000]`. It needs no packages.

FOLDER was written by `optimum-cli export onnx`, or is laid out as on the Hub, with the graphs under `onnx/`.
"""

from __future__ import annotations

import argparse
import json
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit


PAGE = Path(__file__).resolve().parent
LIBRARY = PAGE / "node_modules/@huggingface/transformers/dist"
RUNTIME = PAGE / "node_modules/onnxruntime-web/dist"
# Browsers allow threads in WebAssembly only on a page that is isolated from other sites by these headers.
ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
PICTURES_NEED = ("preprocessor_config.json",)  # says how pictures become patches


class Model:
    """An exported folder, served as Transformers.js expects it, with the graphs under `onnx/`.

    Args:
        folder: the export. Nothing is written to it.

    Raises:
        ValueError: the folder is not an export. The message is one line that says what to do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pictures = self._takes_pictures()
        self.flat = not pictures and (folder / "model.onnx").is_file()  # it may be of an older export
        needed = NEEDED + (PICTURES_NEED if pictures else ())
        missing = [name for name in needed if not (folder / name).is_file()]
        if not self.flat and not any(folder.glob("onnx/*.onnx")):
            missing.append("onnx/vision_encoder.onnx" if pictures else "model.onnx")
        if missing:
            raise ValueError(
                f"{folder} is no exported model: it has no {', '.join(missing)}. "
                f"Make one with `optimum-cli export onnx --model CHECKPOINT {folder}`."
            )
        self.rewritten = {"config.json": self._config(), "tokenizer_config.json": self._tokenizer_config()}

    def _takes_pictures(self) -> bool:
        path = self.folder / "config.json"
        return path.is_file() and "vision_config" in json.loads(path.read_text(encoding="utf-8"))

    def _config(self) -> dict[str, Any]:
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if self.flat and (self.folder / "model.onnx_data").is_file():
            config["transformers.js_config"] = {"use_external_data_format": {"model.onnx": True}}
        return config

    def _tokenizer_config(self) -> dict[str, Any]:
        config = json.loads((self.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = self.folder / "chat_template.jinja"
        if "chat_template" not in config and template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        if "chat_template" not in config:
            raise ValueError(f"{self.folder} has no chat template. Export a checkpoint that is tuned for chats.")
        return config

    def root(self, name: str) -> tuple[Path, str]:
        """Return the folder of the file that is requested as `name`, and its name in that folder."""
        return self.folder, name.removeprefix("onnx/") if self.flat else name


class Handler(SimpleHTTPRequestHandler):
    """Serves the page at /, the library at /library/, its wasm files at /onnxruntime/ and the model at /model/."""

    protocol_version = "HTTP/1.1"
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }
    server: Server

    def translate_path(self, path: str) -> str:
        """Map a URL to a file of the page, the library, onnxruntime or the model."""
        head, _, name = urlsplit(path).path.lstrip("/").partition("/")
        roots = {"library": (LIBRARY, name), "onnxruntime": (RUNTIME, name), "model": self.server.model.root(name)}
        root, name = roots.get(head, (PAGE, urlsplit(path).path))
        self.directory = str(root)
        return super().translate_path(f"/{name}")  # the base class drops `..` and the like

    def send_head(self) -> BytesIO | BinaryIO | None:
        """Serve the two rewritten configuration files from memory, and all other files from disk."""
        prefix, _, name = urlsplit(self.path).path.partition("/model/")
        content = None if prefix else self.server.model.rewritten.get(name)
        if content is None:
            return super().send_head()
        body = json.dumps(content).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return BytesIO(body)

    def end_headers(self) -> None:
        """Add the headers that isolate the page."""
        for name, value in ISOLATION.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class calls it so
        """Log nothing for a request that worked. `log_error` logs the others."""

    def log_error(self, format: str, *args: Any) -> None:  # noqa: A002  the base class calls it so
        super().log_message(f"{format}: %s", *args, self.path)


class Server(ThreadingHTTPServer):
    """Serves the page with `model`. Port 0 takes a free port."""

    daemon_threads = True

    def __init__(self, model: Model, host: str, port: int) -> None:
        self.model = model
        super().__init__((host, port), Handler)


def make_server(folder: str | Path, host: str = "localhost", port: int = 0) -> Server:
    """Make a server for an export. It is bound to its port and not yet running.

    Raises:
        ValueError: the library is not installed, or the folder is not an export. The message is one line.
        OSError: the port is taken.
    """
    if not (LIBRARY.is_dir() and RUNTIME.is_dir()):
        raise ValueError(f"Transformers.js is not installed. Run `npm ci --ignore-scripts` in {PAGE}.")
    return Server(Model(Path(folder)), host, port)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the chat page with an exported model.")
    parser.add_argument("folder", help="a folder that `optimum-cli export onnx` or `export lfm2` wrote")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    try:
        server = make_server(args.folder, args.host, args.port)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        raise SystemExit(f"error: {args.host}:{args.port}: {error.strerror}. Choose another --port.") from None
    print(f"http://{args.host}:{server.server_port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
