"""The entry point of `optimum-cli export lfm2`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from optimum_lfm2.command import quiet, reported
from optimum_lfm2.publish.folder import publish
from optimum_lfm2.publish.job import Job


def run_publish(args: Namespace, config: Mapping[str, Any]) -> None:
    """Write the folder that `optimum-cli export lfm2` asks for.

    Args:
        args: the parsed arguments.
        config: the contents of the checkpoint's `config.json`.

    Raises:
        SystemExit: 1 for bad input or a failed precision, after one line on stderr for each; 130 when interrupted.
    """
    with reported():
        job = Job.read(args, config)
        with quiet():
            failed = publish(job)
    for line in failed:
        print(f"optimum-cli: error: {line}", file=sys.stderr)
    if failed:
        raise SystemExit(1)
