"""What `optimum-cli` imports at every start: it must stay cheap, and nothing in it may stop another command."""

import importlib
import logging


# Light modules of `optimum.commands.lfm2`. Each has a function `register()`, which returns the commands that it adds as
# (class, parent class) pairs, the parent None for a command of `optimum-cli` itself.
MODULES = ("export_onnx", "export_lfm2", "tools")

_commands = []

for _name in MODULES:
    try:
        _commands += importlib.import_module(f"optimum.commands.lfm2.{_name}").register()
    except Exception as _error:  # noqa: PERF203  one that fails must not stop the next
        _logger = logging.getLogger("optimum_lfm2")
        _logger.error("LFM2's %s is not available: %s: %s", _name, type(_error).__name__, _error)

# An iterator: optimum-cli reads it once for each folder on the path that holds this file, and takes no command twice.
REGISTER_COMMANDS = iter(_commands)
