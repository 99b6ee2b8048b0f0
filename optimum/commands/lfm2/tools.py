"""`optimum-cli lfm2`: the commands for models that are exported already."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum.commands.lfm2.chat import ChatCommand
from optimum.commands.lfm2.evaluate import EvaluateCommand
from optimum.commands.lfm2.help_texts import TOOLS_DESCRIPTION, TOOLS_EPILOG
from optimum.commands.lfm2.quantize_cache import QuantizeCacheCommand
from optimum.commands.lfm2.serve import ServeCommand


class Lfm2Command(BaseOptimumCLICommand):
    """The commands `chat`, `serve`, `evaluate` and `quantize-cache`."""

    COMMAND = CommandInfo(name="lfm2", help="Tools for exported LFM2 models.")
    SUBCOMMANDS = tuple(
        CommandInfo(name=command.COMMAND.name, help=command.COMMAND.help, subcommand_class=command)
        for command in (ChatCommand, ServeCommand, EvaluateCommand, QuantizeCacheCommand)
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description, parser.epilog = TOOLS_DESCRIPTION, TOOLS_EPILOG


def register() -> list[tuple[type, type | None]]:
    """Return the command. It belongs to `optimum-cli` itself, so its parent is None."""
    return [(Lfm2Command, None)]
