"""Registers our commands. Every start of `optimum-cli` imports this, so it stays cheap and must never raise."""

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path


# Light modules of `optimum.commands.lfm2`. Each has a function `register()`. It returns the commands that it adds as
# (class, parent class) pairs. The parent of a command of `optimum-cli` itself is None.
MODULES = ("export_onnx", "export_lfm2", "tools")

_commands = []

for _name in MODULES:
    try:
        _commands += importlib.import_module(f"optimum.commands.lfm2.{_name}").register()
    except Exception as _error:  # noqa: PERF203  a module that fails must not stop the next
        _logger = logging.getLogger("optimum_lfm2")
        _logger.error("LFM2's %s is not available: %s: %s", _name, type(_error).__name__, _error)


class _OncePerStart:
    """Yields the commands once for each start of `optimum-cli`.

    `optimum-cli` reads `REGISTER_COMMANDS` once for each folder of the namespace that holds this file. There are two
    such folders if the package is installed and its source is on the path too. The parser refuses a command that it
    gets twice.
    """

    def __init__(self, commands: list) -> None:
        self._commands = commands
        self._reads = 0

    def __iter__(self) -> Iterator:
        folders = set(importlib.import_module(__package__).__path__)
        copies = sum((Path(folder) / Path(__file__).name).is_file() for folder in folders)
        first = self._reads % max(copies, 1) == 0
        self._reads += 1
        return iter(self._commands if first else ())


REGISTER_COMMANDS = _OncePerStart(_commands)
