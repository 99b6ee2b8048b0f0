"""What `optimum-cli lfm2 serve` checks before it imports a server."""

from __future__ import annotations

import importlib.util
from argparse import Namespace

import transformers
from packaging.version import Version

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.scheduler import Limits


TRANSFORMERS = "5.24"  # the first release whose server can be put together from its parts
PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")
MEGABYTE = 2**20
LEAST = {"max_rows": 1, "max_tokens": 2, "max_queue": 0, "cache_memory": 0, "max_new_tokens": 1, "max_body": 1}


def check_server() -> None:
    """Raise `Lfm2Error` where transformers or a package is too old or missing."""
    if Version(transformers.__version__) < Version(TRANSFORMERS):
        raise Lfm2Error(
            f"The server is transformers' own, of {TRANSFORMERS} or later; installed is {transformers.__version__}. "
            "README says how to install transformers 5 beside optimum-onnx. optimum-cli lfm2 chat needs neither."
        )
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        # Not the extra `serve`: pip would look at optimum-onnx again, which does not admit transformers 5.
        raise Lfm2Error(f"The server needs {', '.join(missing)}: pip install {' '.join(missing)}")


def serve(args: Namespace, key: str | None) -> None:
    """Serve as the command's options say.

    Raises:
        Lfm2Error: an option is out of its range, or a folder is no export of ours.
    """
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise Lfm2Error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it has to be {least} or more.")
    from optimum_lfm2.serving.server import Bounds, Settings, run_server

    run_server(
        args.models,
        args.file_name,
        Settings(
            host=args.host,
            port=args.port,
            key=key,
            body=args.max_body * MEGABYTE,
            bounds=Bounds(args.max_prompt, args.max_new_tokens),
            limits=Limits(args.max_rows, args.max_tokens, args.max_queue, args.cache_memory * MEGABYTE),
        ),
    )
