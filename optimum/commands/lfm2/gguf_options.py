"""The options of both export commands for GGUF files. Every start of `optimum-cli` imports this, so it stays light."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path


def add_gguf_options(parser: ArgumentParser) -> None:
    """Add the options of GGUF files, which `--model` may be too."""
    group = parser.add_argument_group("LFM2 in a GGUF file (--model FILE.gguf, or --model with --gguf-file)")
    group.add_argument("--gguf-file", metavar="NAME", help="the GGUF file in the folder or Hub model of --model")
    group.add_argument(
        "--tokenizer", metavar="MODEL", help="a folder or id whose tokenizer to take (default: that in the GGUF file)"
    )


def names_gguf(args: Namespace) -> bool:
    """Return whether a GGUF file is to be exported.

    Raises:
        ValueError: an option of GGUF files is given without one.
    """
    file = Path(args.model)
    if getattr(args, "gguf_file", None) is not None or (file.suffix == ".gguf" and file.is_file()):
        return True
    if getattr(args, "tokenizer", None) is not None:
        raise ValueError("--tokenizer goes with a GGUF file. Other models bring their own: leave it out.")
    return False
