"""The entry point of `optimum-cli export lfm2`, and what the command says at its end."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_lfm2.command import opened_gguf, quiet, reported
from optimum_lfm2.file_names import ONNX_FOLDER
from optimum_lfm2.publish.folder import Outcome, publish
from optimum_lfm2.publish.job import Job
from optimum_lfm2.publish.precisions import Published
from optimum_lfm2.registration import claim
from optimum_lfm2.report import loading, megabytes, text_table
from optimum_lfm2.weights.checkpoint import GGUF_LINK
from optimum_lfm2.weights.gguf import stored_bits


def run_publish(args: Namespace, config: Mapping[str, Any], bits: int | None = None) -> None:
    """Write the folder that `optimum-cli export lfm2` asks for.

    Args:
        args: the parsed arguments.
        config: the contents of the checkpoint's `config.json`.
        bits: of most codes of a GGUF file. None for weights in float.

    Raises:
        SystemExit: 1 for bad input or a failed precision, after one line on stderr for each; 130 when interrupted.
    """
    with reported():
        job = Job.read(args, config, bits)
        claim(config["model_type"])
        with quiet():
            outcome = publish(job)
        print(_summary(job, outcome), flush=True)
    for line in outcome.failed:
        print(f"optimum-cli: error: {line}", file=sys.stderr)
    if outcome.failed:
        raise SystemExit(1)


def run_publish_gguf(args: Namespace) -> None:
    """Write the folder for a GGUF file, as `run_publish` does for a checkpoint."""
    with reported(), opened_gguf(args) as config:
        run_publish(args, config, stored_bits(Path(args.model, GGUF_LINK).readlink()))


def _summary(job: Job, outcome: Outcome) -> str:
    """Return the table of the folder's files, and what to do with them."""
    files, card = outcome.files, outcome.card
    measured = any(file.quality for file in files)
    title = ("precision", "file", "MB", "checked within", *(("loss",) if measured else ()))
    lines = [f"\n{job.output} has:", text_table([title, *(_row(file, measured) for file in files)])]
    if not measured:
        lines.append("Checked against transformers. What rounding costs is not measured: --text FILE does that.")
    chosen = job.kind.preferred(files).path.name
    if code := loading(job.task, job.output, job.loader, subfolder=ONNX_FOLDER, file_name=chosen):
        lines += ["Load it in Python:", code]
    name = card.name if "/" in card.name else f"YOU/{Path(job.model).resolve().name}-ONNX"
    lines += ["Upload it, with its model card README.md:", f"  hf upload {name} {shlex.quote(str(job.output))}"]
    if card.license is None:
        lines.append("The model card names no licence, since none was found beside the checkpoint: give --license.")
    return "\n".join(lines)


def _row(file: Published, measured: bool) -> tuple[str, ...]:
    name = f"{ONNX_FOLDER}/{file.path.name}" + f" and {len(file.parts)} parts" * bool(file.parts)
    difference = max(part.difference for part in file.all)
    cells = (file.precision, name, megabytes(file.size), f"{difference:.2g}")
    return (*cells, file.quality.summary() if file.quality else "not measured") if measured else cells
