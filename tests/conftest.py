"""Session fixtures. Each checkpoint of the table is made, exported and loaded once."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the Hub, and none may wait for it

from collections import Counter
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from checkpoints import make_checkpoint
from filelock import FileLock
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

# This import comes before Optimum's. It registers LFM2, and on transformers 5 it provides names that Optimum imports.
import optimum_lfm2  # noqa: F401


def _one_thread(create: Callable[..., None]) -> Callable[..., None]:
    """A second thread makes no tiny model faster: it spins, and takes a core from another worker of pytest-xdist."""

    @wraps(create)
    def init(self: Any, model: Any, sess_options: Any = None, *args: Any, **kwargs: Any) -> None:
        sess_options = sess_options or onnxruntime.SessionOptions()
        sess_options.intra_op_num_threads = sess_options.intra_op_num_threads or 1
        create(self, model, sess_options, *args, **kwargs)

    return init


torch.set_num_threads(1)
onnxruntime.InferenceSession.__init__ = _one_thread(onnxruntime.InferenceSession.__init__)
disable_progress_bar()  # transformers 5 shows one for every checkpoint that a test saves

DEMO = Path(__file__).parent.parent / "demo"
TRAINED = {"trained": DEMO / "checkpoint", "trained_vision": DEMO / "vision_checkpoint"}


# Files whose few tests take long.
LONG = (
    "test_readme_environment.py",
    "test_benchmarks.py",
    "test_mutations.py",
    "test_full_size.py",
    "test_web_lfm3_vl.py",
    "test_web.py",
    "test_publish.py",
    "test_vision_folder.py",
    "test_others_untouched.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of `LONG`, go on with those of many tests. A long file at the end leaves one core idle."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG, -tests[item.path]))


def pytest_collection_finish() -> None:
    """What the imports made stays. Garbage collection that looks at it each time takes 7 % of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)` gives a folder that `make` filled, for all workers of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    shared.mkdir(exist_ok=True)

    def made_once(name: str, make: Callable[[Path], object]) -> Path:
        path, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)  # of a `make` that failed
                make(path)
                done.touch()
        return path

    return made_once


@pytest.fixture(scope="session")
def checkpoint(made_once: Callable[..., Path]) -> Callable[..., Path]:
    """`checkpoint(name)` gives the folder of one of `tests.checkpoints`, or of `TRAINED`. Never write to it."""

    @cache
    def checkpoint(name: str) -> Path:
        if name in TRAINED:
            return TRAINED[name]
        return made_once(f"checkpoints-{name}", lambda folder: make_checkpoint(name, folder)) / name

    return checkpoint


@pytest.fixture(scope="session")
def exported(checkpoint: Callable[[str], Path], made_once: Callable[..., Path]) -> Callable[..., Path]:
    """`exported(name, **options)` gives the folder of an export by `main_export(**options)`. Never write to it.

    An export without options is validated.
    """

    @cache
    def exported(name: str, **options: object) -> Path:
        from optimum.exporters.onnx import main_export

        from optimum_lfm2.validation.decoder import errors_as_they_are

        def make(folder: Path) -> None:
            with errors_as_they_are():
                main_export(str(checkpoint(name)), folder, **{"do_validation": not options, **options})

        path = "-".join(["export", name, *(f"{key}={value}" for key, value in sorted(options.items()))])
        return made_once(path, make)

    return exported


@pytest.fixture(scope="session")
def gold_model(checkpoint: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """`gold_model(name)` gives the checkpoint as transformers loads it."""

    @cache
    def gold_model(name: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()

    return gold_model


@pytest.fixture(scope="session")
def hub_folder(made_once: Callable[..., Path]) -> Path:
    """What `optimum-cli export lfm2` wrote for the trained checkpoint, in every precision. Never write to it."""
    from publishing import TEXT, run

    def publish(place: Path) -> None:
        with pytest.MonkeyPatch.context() as patched:
            for owner, name in ((PreTrainedModel, "from_pretrained"), (torch.nn.Module, "load_state_dict")):
                patched.setattr(owner, name, lambda *_, **__: pytest.fail("a model is loaded as a whole"))
            names = ("--base-model", "me/trained", "--license", "apache-2.0")
            assert run("--model", TRAINED["trained"], place / "lfm2", *names, *TEXT) == 0

    return made_once("publish", publish) / "lfm2"


@pytest.fixture(scope="session")
def experts_folder(checkpoint: Callable[[str], Path], made_once: Callable[..., Path]) -> Path:
    """The same folder for a tiny model with experts, which needs transformers 5. Never write to it."""
    from publishing import run

    from benchmarks.checkpoint import add_tokenizer

    def publish(place: Path) -> None:
        source = add_tokenizer(shutil.copytree(checkpoint("moe"), place / "checkpoint"))
        text = place / "text"
        text.write_text("qjxzvkqzxj" * 20)  # these letters never merge into a longer token; the model has only 256 ids
        assert run("--model", source, place / "lfm2-moe", "--text", text, "--chunks", 2, "--length", 32) == 0

    return made_once("experts", publish) / "lfm2-moe"


@pytest.fixture(scope="session")
def hybrid_folder(checkpoint: Callable[[str], Path], made_once: Callable[..., Path]) -> Callable[[str], Path]:
    """`hybrid_folder(name)` gives the same folder for a tiny Granite or Olmo-Hybrid. Never write to it."""
    from publishing import run

    from benchmarks.checkpoint import add_tokenizer

    def hybrid_folder(name: str) -> Path:
        def publish(place: Path) -> None:
            source = add_tokenizer(shutil.copytree(checkpoint(name), place / "checkpoint"))
            text = place / "text"
            text.write_text("qjxzvkqzxj" * 20)  # as above
            options = ("--precisions", "fp32", "fp16", "q8", "q4", "--text", text, "--chunks", 2, "--length", 32)
            assert run("--model", source, place / name, *options) == 0

        return made_once(f"publish-{name}", publish) / name

    return hybrid_folder


@pytest.fixture(scope="session")
def vl_checkpoint(made_once: Callable[..., Path]) -> Path:
    """The tiny LFM2-VL of `tests.pictures`. Never write to it."""
    from pictures import make_vl_checkpoint

    return made_once("vl-checkpoint", lambda folder: make_vl_checkpoint(folder / "vl")) / "vl"


@pytest.fixture(scope="session")
def vl_folder(vl_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export, validated. Never write to it."""
    from optimum.exporters.onnx import main_export

    path = tmp_path_factory.mktemp("vl") / "export"
    main_export(str(vl_checkpoint), path)
    return path


@pytest.fixture(scope="session")
def vl_hub_folder(vl_checkpoint: Path, made_once: Callable[..., Path]) -> Path:
    """What `optimum-cli export lfm2` wrote for it, in every precision. Never write to it."""
    from publishing import TEXT, run

    def publish(place: Path) -> None:
        assert run("--model", vl_checkpoint, place / "lfm2-vl", "--base-model", "me/vl", *TEXT) == 0

    return made_once("vl-publish", publish) / "lfm2-vl"


@pytest.fixture(scope="module")
def no_pauses():
    """Benchmarks do not wait between their rounds."""
    from benchmarks import turns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "PAUSE", 0)
        yield


@pytest.fixture(scope="module")
def jobs_here():
    """Benchmarks make their files in this process. To import the libraries anew takes longer than all the rest."""
    from benchmarks import worker
    from benchmarks.bench import Bench

    in_a_process = Bench.job

    def job(self: Bench, name: str, job: str, **values: Any) -> dict[str, Any]:
        if job in ("load", "memory"):  # these say what a process takes
            return in_a_process(self, name, job, **values)
        return worker.JOBS[job](json.loads(self._command(name, job, values)[-1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "job", job)
        yield


@pytest.fixture
def cli_said(monkeypatch, capfd):
    """`cli_said(*arguments)` runs `optimum-cli` in this process: the exit code, standard output and standard error."""
    from optimum.commands.optimum_cli import main

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def cli(cli_said):
    """The same without standard output."""

    def run(*args: object) -> tuple[int, str]:
        code, _, err = cli_said(*args)
        return code, err

    return run


@pytest.fixture
def out(tmp_path) -> Path:
    """An output folder with older files. A failure must leave them as they are."""
    folder = tmp_path / "work" / "out"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_text("old")
    (folder / "notes.txt").write_text("mine")
    return folder
