"""`optimum-cli export onnx`, for LFM2 checkpoints. Every other model goes to Optimum as if this plugin were not there.

Imported at every start of `optimum-cli`: nothing heavy at the top, and `optimum_lfm2` is heavy.
"""

from __future__ import annotations

import functools
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimum.commands.export.onnx import ONNXExportCommand


FAMILY = "lfm"
CHECKPOINT_FILES = (
    "config.json",
    "model_index.json",
    "modules.json",
    "*/config.json",
)


def register() -> list[tuple[type, type | None]]:
    """Wrap the command's `run`, once: a second command named `onnx` would break the parser."""
    if not hasattr(ONNXExportCommand.run, "__wrapped__"):
        ONNXExportCommand.run = _wrap(ONNXExportCommand.run)
    return []


def _wrap(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def run(self: ONNXExportCommand) -> None:
        try:
            config = read_config(self.args)
        except ValueError as error:
            fail(error)
        if not str(config.get("model_type", "")).startswith(FAMILY):
            original(self)
            return
        from optimum_lfm2.export.command import run_export

        run_export(self, original, config)

    return run


def read_config(args: Namespace) -> dict[str, Any]:
    """The `config.json` of `--model`, a folder or an id of the Hub; empty where it has none, which Optimum may know.

    Raises:
        ValueError: for what is no model at all.
    """
    folder = Path(args.model)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is a PEFT adapter, not a model. Load it with peft, save model.merge_and_unload(), and give "
                "that folder."
            )
        if not any(any(folder.glob(pattern)) for pattern in CHECKPOINT_FILES):
            raise ValueError(f"{folder} holds no checkpoint: it has no config.json. Give the folder that has.")
        path = folder / "config.json"
        return _parsed(path) if path.is_file() else {}
    if folder.exists():
        raise ValueError(f"{folder} is a file. Give the checkpoint's folder.")
    downloaded = _download(args)
    return {} if downloaded is None else _parsed(downloaded)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}). Download or copy it again.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no model's configuration. Download or copy it again.")
    return config


def _download(args: Namespace) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(args.model, "config.json", cache_dir=args.cache_dir))
    except GatedRepoError:
        raise ValueError(f"{args.model} is gated. Ask for access on its page, then run `hf auth login`.") from None
    except (HFValidationError, RepositoryNotFoundError):
        raise ValueError(f"{args.model} is neither a folder nor a model of the Hub. Is it spelled right?") from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{args.model} is no folder, and the Hub cannot be reached to look for it. Check the path or the network."
        ) from None
    except EntryNotFoundError:
        return None


def fail(error: BaseException) -> None:
    """One line on stderr, exit code 1."""
    print(f"optimum-cli: error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(1)
