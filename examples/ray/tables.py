"""What `embed.py` and `generate.py` share: a table in Parquet goes through actors, each with a model of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ray
from onnxruntime import SessionOptions
from ray import cloudpickle
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of what both take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="an exported folder, which every machine has at the same path")
    add("source", help="a Parquet file or a folder of them, with the columns id and text. No id may come twice")
    add("out", help="folder for the results. What it has already is not made again")
    add("--actors", type=int, default=1, help="how many models work at once")
    add("--cores", type=int, default=2, help="cores of each")
    add("--batch", type=int, default=16, help="rows that an actor takes at a time")
    return parser


def session_options(cores: int) -> SessionOptions:
    """Return options by which a session takes so many cores, and not all of the machine."""
    options = SessionOptions()
    options.intra_op_num_threads = cores
    return options


def process(actor: type, args: argparse.Namespace, **settings: Any) -> None:
    """Give each row of the source to one of the actors, and write what they return.

    Rows are noted as done once their results are written. So a run that was ended goes on where it was, and a run that
    came to its end has nothing left to do.

    Args:
        actor: made with the model's folder, its cores and the settings. It is called with a batch of rows.
        args: those of `arguments`.
    """
    for name in {__name__, actor.__module__} - {"__main__"}:  # other machines need the environment, not these files
        cloudpickle.register_pickle_by_value(sys.modules[name])
    done = Path(args.out).resolve() / ".done"
    DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(done), delete_checkpoint_on_success=False
    )
    results = Path(args.out).resolve() / "results"
    rows = ray.data.read_parquet(args.source, columns=["id", "text"])
    rows.map_batches(
        actor,
        batch_size=args.batch,
        compute=ActorPoolStrategy(size=args.actors),
        num_cpus=args.cores,
        fn_constructor_args=[str(Path(args.model).resolve()), args.cores],
        fn_constructor_kwargs=settings,
    ).write_parquet(str(results))
