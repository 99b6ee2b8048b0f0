"""`optimum-cli export onnx`, for LFM2 checkpoints. Every other model goes to Optimum as if this plugin were not there.

Every start of `optimum-cli` imports this. So the top imports nothing heavy, and `optimum_lfm2` is heavy.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimum.commands.export.onnx import ONNXExportCommand

from optimum.commands.lfm2.gguf_options import add_gguf_options, names_gguf
from optimum.commands.lfm2.help_texts import ONNX_EPILOG
from optimum.commands.lfm2.model_types import MODEL_TYPES


# An attribute of our wrapper. `functools.wraps` copies it to a wrapper that another plugin puts around ours.
WRAPPED = "_wrapped_for_lfm2"


class NoSuchModelError(ValueError):
    """`--model` is no folder, and no model of the Hub: nobody's."""


def register() -> list[tuple[type, type | None]]:
    """Wrap the command's `run` once, and add no command. A second command named `onnx` would break the parser.

    Its help says at its end where LFM2's options are explained.
    """
    if not hasattr(ONNXExportCommand.run, WRAPPED):
        ONNXExportCommand.run = _wrap(ONNXExportCommand.run)
    if not hasattr(ONNXExportCommand.parse_args, WRAPPED):
        ONNXExportCommand.parse_args = staticmethod(_with_epilog(ONNXExportCommand.parse_args))
    return []


def _with_epilog(original: Callable[[ArgumentParser], None]) -> Callable[[ArgumentParser], None]:
    @functools.wraps(original)
    def parse_args(parser: ArgumentParser) -> None:
        original(parser)
        add_gguf_options(parser)
        parser.epilog = " ".join(filter(None, (parser.epilog, ONNX_EPILOG)))

    setattr(parse_args, WRAPPED, True)
    return parse_args


def _wrap(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def run(self: ONNXExportCommand) -> None:
        try:
            _check_adapter(Path(self.args.model))
            gguf = names_gguf(self.args)
        except ValueError as error:
            fail(error)
        if gguf:
            from optimum_lfm2.command import run_gguf_export

            run_gguf_export(self, original)
            return
        config = _our_config(self.args)
        if config is None:
            original(self)
            return
        from optimum_lfm2.command import run_export

        run_export(self, original, config)

    setattr(run, WRAPPED, True)
    return run


def _check_adapter(folder: Path) -> None:
    """Raise `ValueError` for a folder that holds a PEFT adapter of our model and no model."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        from optimum_lfm2.loading.adapters import check_adapter

        check_adapter(folder)


def _our_config(args: Namespace) -> dict[str, Any] | None:
    """Return the `config.json` of `--model` if it names a type of ours. Return None otherwise."""
    try:
        config = read_config(args)
    except NoSuchModelError as error:  # Optimum would answer with a traceback, on transformers 5 about an import
        fail(error)
    except Exception:  # the model may be anybody's, so Optimum says what is wrong
        return None
    return config if config.get("model_type") in MODEL_TYPES else None


def read_config(args: Namespace) -> dict[str, Any]:
    """Read the `config.json` of `--model`, which is a folder or an id of the Hub.

    Raises:
        NoSuchModelError: `--model` is nothing that anybody could load.
        ValueError: there is no such file, or it cannot be read.
    """
    folder = Path(args.model)
    if folder.is_dir():
        _check_adapter(folder)
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no LFM2 checkpoint: it has no config.json. Give the folder that has.")
        return _parsed(path)
    if folder.exists():
        kind = NoSuchModelError if _lies_in_ours(folder) else ValueError
        raise kind(f"{folder} is a file. Give the checkpoint's folder.")
    return _parsed(_download(args))


def _lies_in_ours(file: Path) -> bool:
    """Return whether a file lies beside a `config.json` of ours."""
    try:
        return _parsed(file.parent / "config.json").get("model_type") in MODEL_TYPES
    except ValueError:
        return False


def _parsed(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:  # the last of lists within lists
        raise ValueError(f"{path} cannot be read as JSON ({error}). Download or copy it again.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no model's configuration. Download or copy it again.")
    return config


def _download(args: Namespace) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.file_download import repo_folder_name

    # Without a network its logger says so in a dozen lines, and we in one.
    logger = logging.getLogger("huggingface_hub.utils._http")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return Path(hf_hub_download(args.model, "config.json", cache_dir=args.cache_dir))
    except GatedRepoError:
        raise ValueError(f"{args.model} is gated. Ask for access on its page, then run `hf auth login`.") from None
    except HFValidationError:
        raise NoSuchModelError(f"{args.model} is neither a folder nor an id of the Hub. Is it spelled right?") from None
    except RepositoryNotFoundError:
        raise NoSuchModelError(
            f"{args.model} is neither a folder nor a model of the Hub. Is it spelled right? "
            "A private model needs `hf auth login`."
        ) from None
    except LocalEntryNotFoundError:
        cached = Path(args.cache_dir or HF_HUB_CACHE, repo_folder_name(repo_id=args.model, repo_type="model"))
        is_path = Path(args.model).parent.is_dir() and not cached.exists()  # else it may be anybody's model
        raise (NoSuchModelError if is_path else ValueError)(
            f"{args.model} is no folder, and no config.json of it is in the cache of the Hub, which was not reached. "
            "Check the path and the network."
        ) from None
    except EntryNotFoundError:
        raise ValueError(f"{args.model} holds no LFM2 checkpoint: it has no config.json on the Hub.") from None
    finally:
        logger.setLevel(before)


def fail(error: BaseException) -> None:
    """Print the error as one line on stderr and exit with 1."""
    print(f"optimum-cli: error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(1)
