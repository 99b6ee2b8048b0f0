"""`python -m optimum_lfm2`: the installed releases, for a bug report, and the commands."""

from __future__ import annotations

import platform
from argparse import ArgumentParser
from importlib.metadata import PackageNotFoundError, version

from optimum.commands.export.onnx import ONNXExportCommand

from optimum.commands.lfm2.export_lfm2 import ExportLfm2Command
from optimum.commands.lfm2.tools import Lfm2Command
from optimum_lfm2 import __version__
from optimum_lfm2.families import MEMBERS


# What a bug may depend on. Of alternatives such as onnxruntime and onnxruntime-gpu only those that are installed count.
PACKAGES = (
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "numpy",
)


def main() -> None:
    """Print the releases and the commands. Take no arguments but `--help`."""
    description = "Print the installed releases, for a bug report, and the commands that optimum-lfm2 has."
    ArgumentParser("python -m optimum_lfm2", description=description).parse_args()
    print(f"optimum-lfm2 {__version__}, Python {platform.python_version()}, {platform.platform()}\n")
    for name in PACKAGES:
        if release := _release(name):
            print(f"  {name:<20}{release}")
    types = dict.fromkeys(member.model_type for member in MEMBERS)
    print(f"\nIt exports the model types {', '.join(types)}. Its commands, each with --help:\n")
    for command, text in _commands().items():
        print(f"  {command:<34}{text}")


def _release(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commands() -> dict[str, str]:
    exports = {
        f"export {command.COMMAND.name}": command.COMMAND.help for command in (ONNXExportCommand, ExportLfm2Command)
    }
    tools = {f"{Lfm2Command.COMMAND.name} {info.name}": info.help for info in Lfm2Command.SUBCOMMANDS}
    return {f"optimum-cli {name}": text for name, text in (exports | tools).items()}


if __name__ == "__main__":
    main()
