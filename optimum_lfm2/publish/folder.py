"""Write one folder that several runtimes read: an ONNX file per precision, their configuration, and a model card."""

from __future__ import annotations

import gc
import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optimum.exporters.onnx import convert
from optimum.exporters.tasks import TasksManager
from optimum.utils.save_utils import maybe_save_preprocessors
from transformers import AutoTokenizer, PretrainedConfig

from optimum_lfm2 import compat
from optimum_lfm2.caches import CACHE_NAMES
from optimum_lfm2.configs import DTYPES
from optimum_lfm2.errors import Lfm2Error, read_object
from optimum_lfm2.export.config_check import loaded_config
from optimum_lfm2.export.js_config import JS_CONFIG, declare_external_data
from optimum_lfm2.export.loading import Lfm2TasksManager, task_of
from optimum_lfm2.export.options import check_atol, check_model
from optimum_lfm2.export.staging import staged
from optimum_lfm2.export.validation import validate
from optimum_lfm2.families import member_of
from optimum_lfm2.genai_config import write_genai_config
from optimum_lfm2.metadata import CHECKPOINT, COMPARED, DIFFERENCE, QUALITY, TEXT
from optimum_lfm2.publish.card import CardOptions, write_card
from optimum_lfm2.publish.precisions import (
    MEASURED_OF_ENCODERS,
    ONNX_FOLDER,
    PRECISIONS,
    Precision,
    Published,
    annotate,
    preferred,
    published,
)
from optimum_lfm2.quality.evaluate import Quality, measure, read_chunks
from optimum_lfm2.quality.scoring import load, reference_model
from optimum_lfm2.quality.similarity import Similarity, compare_encoders, load_encoder, reference_encoder
from optimum_lfm2.weights.checkpoint import find_tensors, fingerprint
from optimum_lfm2.weights.modules import copy_modules


TASK = "text-generation"
WITH_PAST = "-with-past"
LEAST_COSINE = 0.99  # of an encoder in 4 bits with its checkpoint: below, the vectors find other documents
COMPARISON = (
    "run layer by layer on random tokens when it was written, and each layer compared with that of transformers on the "
    "same input, with the values that the file's weights stand for, activations in float: the largest difference for a "
    "token, as a share of what the layer adds for it"
)
# The traced graph is the same for any shape. A small one is chosen since a CPU is slow in half precision.
TRACED = {"batch_size": 1, "sequence_length": 2}
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Job:
    """A request to `optimum-cli export lfm2`.

    Attributes:
        model: the checkpoint's folder, or its id on the Hub.
        output: the folder to write.
        precisions: keys of `PRECISIONS`.
        cache_names: the naming convention of the caches, a key of `CACHE_NAMES`.
        atol: the tolerance of the check, as `validate` takes it.
        text: the text file on which the quality is measured; None measures nothing.
        chunks, length: the largest number of chunks of that text, and the tokens of a chunk.
        cache_dir: the folder of the Hub's cache; None is its default.
        card: what the user wants the model card to say.
        task: what the files are for: `text-generation-with-past`, or the task of an encoder's head.
    """

    model: str
    output: Path
    precisions: tuple[str, ...]
    cache_names: str
    atol: float | None
    text: Path | None
    chunks: int
    length: int
    cache_dir: str | None
    card: CardOptions
    task: str

    @classmethod
    def read(cls, args: Namespace, config: Mapping[str, Any]) -> Job:
        """Read the request from parsed arguments and the checkpoint's `config.json`.

        Raises:
            Lfm2Error: the request cannot work. It is refused before any work.
        """
        check_model(args.model, config)
        if member_of(config).text is not None:
            raise Lfm2Error(
                f"{args.model} takes pictures too, which optimum-cli export lfm2 does not write yet. "
                "Use optimum-cli export onnx."
            )
        encodes = member_of(config).encodes
        if unknown := sorted(set(args.precisions or ()) - PRECISIONS.keys()):
            raise Lfm2Error(f"--precisions {' '.join(unknown)} is not known. Choose among {', '.join(PRECISIONS)}.")
        if args.cache_names not in CACHE_NAMES:
            raise Lfm2Error(f"--cache-names {args.cache_names} is not known. Choose among {', '.join(CACHE_NAMES)}.")
        if encodes and args.cache_names != "hub":
            raise Lfm2Error(f"--cache-names {args.cache_names}: an encoder has no caches. Leave the option out.")
        if encodes and args.text is None and (risky := sorted(set(args.precisions or ()) & MEASURED_OF_ENCODERS)):
            raise Lfm2Error(
                f"--precisions {' '.join(risky)}: 4 bits change the vectors of an encoder. Give --text, on which the "
                f"cosine with the checkpoint is measured: {LEAST_COSINE} is asked for."
            )
        check_atol(args.atol)
        default = [name for name in PRECISIONS if not (encodes and name in MEASURED_OF_ENCODERS)]
        if Path(args.model).is_dir() and args.output.resolve() == Path(args.model).resolve():
            raise Lfm2Error(f"{args.output} is the checkpoint itself. Give another folder to write to.")
        return cls(
            args.model,
            args.output,
            tuple(name for name in PRECISIONS if name in (args.precisions or default)),
            args.cache_names,
            args.atol,
            args.text,
            args.chunks,
            args.length,
            args.cache_dir,
            CardOptions(args.repo_id, args.base_model, args.license),
            member_of(config).task(config.get("architectures")) if encodes else f"{TASK}{WITH_PAST}",
        )


def publish(job: Job) -> list[str]:
    """Write the requested precisions into the folder, each after a check against transformers.

    Precisions that the folder has already stay there.

    Returns:
        A line for each precision that failed. The folder does not contain these.

    Raises:
        Lfm2Error: the checkpoint cannot be exported, the folder belongs to another checkpoint, or every precision
            failed. The folder stays as it was.
    """
    with staged(job.output) as folder:
        config = _save_configuration(job, folder)
        checkpoint = fingerprint(find_tensors(job.model, cache_dir=job.cache_dir))
        _check_output(job, folder, checkpoint)
        text = _read_text(job, folder)
        failed = _write_files(job, folder, checkpoint)
        if text is not None:
            failed += _measure(job, published(folder), text)
        if not published(folder):
            raise Lfm2Error("\n".join(failed))
        files = published(job.output, folder)
        _declare_external_data(job, folder, files)
        chosen = preferred(files, encodes=member_of(config).encodes)
        write_genai_config(folder, f"{ONNX_FOLDER}/{chosen.path.name}", config, chosen.caches)
        write_card(folder, files, job.output, job.model, job.card, cache_dir=job.cache_dir)
    return failed


def _save_configuration(job: Job, folder: Path) -> PretrainedConfig:
    """Write config.json, generation_config.json and the tokenizer's files, in a form that every runtime reads."""
    config = loaded_config(job.model, cache_dir=job.cache_dir)
    compat.spell_rope_for_both(config)
    encodes = member_of(config).encodes
    if not encodes and task_of(config) != TASK:
        raise Lfm2Error(
            f"{job.model} has no language modelling head. Use optimum-cli export onnx --task feature-extraction."
        )
    if encodes:
        model = _load(job, "fp32")
        config = model.config  # it does not name the checkpoint's code
        copy_modules(model.source.modules, folder)
    else:
        _load(job, "fp32").generation_config.save_pretrained(folder)
    config.save_pretrained(folder)
    maybe_save_preprocessors(job.model, folder)
    if not (folder / TOKENIZER).is_file():
        raise Lfm2Error(f"{job.model} has no tokenizer, and every runtime needs one. Copy {TOKENIZER} there.")
    compat.spell_tokenizer_for_both(folder)
    compat.repeat_chat_template(folder)
    return config


def _check_output(job: Job, folder: Path, checkpoint: str) -> None:
    """Refuse a folder whose files are of another checkpoint or name their caches differently."""
    if (job.output / "model.onnx").exists():
        raise Lfm2Error(f"{job.output} has a model.onnx of optimum-cli export onnx. Give another folder.")
    old, new = (_read_config(path) for path in (job.output, folder))
    if old and (different := sorted(name for name in old.keys() & new.keys() if old[name] != new[name])):
        raise Lfm2Error(
            f"{job.output} holds another model: {', '.join(different)} differ in its config.json. Give another folder."
        )
    for file in published(job.output):
        if file.checkpoint != checkpoint:
            raise Lfm2Error(f"{file.path} was made of other weights than {job.model} has. Give another folder.")
        if file.cache_names != job.cache_names:
            raise Lfm2Error(
                f"{file.path} names its caches by the convention {file.cache_names}, not {job.cache_names}. "
                f"Use --cache-names {file.cache_names}, or another folder."
            )


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json without the entries in which files of one model may differ; empty where there is no file."""
    path = folder / "config.json"
    config = read_object(path) if path.is_file() else {}
    return {name: value for name, value in config.items() if name not in (JS_CONFIG, "transformers_version")}


def _read_text(job: Job, folder: Path) -> list[torch.Tensor] | None:
    if job.text is None:
        return None
    return read_chunks(job.text, AutoTokenizer.from_pretrained(folder), job.chunks, job.length)


def _write_files(job: Job, folder: Path, checkpoint: str) -> list[str]:
    """Write and check the file of each precision. Weights are loaded once per dtype. Return a line per failure."""
    failed = []
    for dtype in DTYPES:
        precisions = {name: PRECISIONS[name] for name in job.precisions if PRECISIONS[name].dtype == dtype}
        model = _load(job, dtype) if precisions else None
        for name, precision in precisions.items():
            path = folder / ONNX_FOLDER / precision.file
            try:
                notes = _write_file(job, model, precision, path)
            except Lfm2Error as error:
                failed.append(_removed(name, path, error))
                continue
            annotate(path, {CHECKPOINT: checkpoint, **notes})
            file = Published.read(name, path)
            size, difference = f"{file.size / 1e6:.1f} MB", f"{file.difference:.2g}"
            print(f"{name}: {precision.file}, {size}, within {difference} of transformers")
        del model
        gc.collect()
    return failed


def _removed(name: str, path: Path, error: Lfm2Error) -> str:
    """Remove the file of a precision that failed, and return the line that reports it."""
    for written in path.parent.glob(f"{path.name}*"):
        written.unlink()
    return f"{name}: {' '.join(str(error).split())}"


def _load(job: Job, dtype: str) -> Any:
    return Lfm2TasksManager.get_model_from_task(
        job.task, job.model, torch_dtype=DTYPES[dtype], cache_dir=job.cache_dir, library_name="transformers"
    )


def _write_file(job: Job, model: Any, precision: Precision, path: Path) -> dict[str, str]:
    """Export to `path` and check the file. Return what the check found, as entries for the file's metadata."""
    task, cached = job.task.removesuffix(WITH_PAST), job.task.endswith(WITH_PAST)
    constructor: Any = TasksManager.get_exporter_config_constructor(
        "onnx", model=model, task=job.task, library_name="transformers"
    )
    config = constructor.func(
        model.config, task=task, float_dtype=precision.dtype, use_past=cached, use_past_in_inputs=cached
    )
    config.variant = precision.variant
    # Transformers.js 4.3 and onnxruntime-genai 0.18 feed `num_logits_to_keep` only where it has no default. With a
    # default, a browser would compute the logits of the whole prompt and run out of memory.
    options = {"num_logits_to_keep": "required", "cache_names": job.cache_names} if cached else {}
    if config.scheme is not None:
        # Builds of onnxruntime for the browser have no kernel for the fused embedding (see `EMBEDDINGS`).
        options["embedding"] = "portable"
    convert.export(model, config, path, dtype=precision.dtype, input_shapes=dict(TRACED), model_kwargs=dict(options))
    differences = validate(config, model, path, job.atol)
    return {DIFFERENCE: repr(max(differences.values())), COMPARED: COMPARISON}


def _measure(job: Job, files: list[Published], text: list[torch.Tensor]) -> list[str]:
    """Compare each file with the checkpoint in float32 and note the result in it. Return a line per failure."""
    failed: list[str] = []
    if not files:
        return failed
    compare = _comparison(job)
    for file in files:
        try:
            quality = compare(file.path, text)
            if isinstance(quality, Similarity) and file.precision in MEASURED_OF_ENCODERS:
                _check_similarity(quality)
        except Lfm2Error as error:
            failed.append(_removed(file.precision, file.path, error))
            continue
        annotate(file.path, {QUALITY: json.dumps(quality.as_dict()), TEXT: job.text.name})
        print(f"{file.precision}: {quality.summary()}")
    return failed


def _comparison(job: Job) -> Callable[[Path, list[torch.Tensor]], Quality | Similarity]:
    """Return what compares a file with the checkpoint in float32 on chunks of text."""
    model = _load(job, "fp32")
    if job.task.endswith(WITH_PAST):
        gold = reference_model(model)
        return lambda path, text: measure(load(path), gold, text)
    encoder = reference_encoder(model)
    return lambda path, text: compare_encoders(load_encoder(path), encoder, text)


def _check_similarity(quality: Similarity) -> None:
    if not quality.cosine > LEAST_COSINE:
        raise Lfm2Error(
            f"The cosine with the checkpoint is {quality.cosine:.4f} on this text, and {LEAST_COSINE} is asked for. "
            "Use q8."
        )


def _declare_external_data(job: Job, folder: Path, files: Iterable[Published]) -> None:
    """Declare to Transformers.js which files have external weights. Its other settings in an older folder stay."""
    before = job.output / "config.json"
    old = read_object(before).get(JS_CONFIG) if before.is_file() else None
    declare_external_data(folder, [file.path for file in files], old if isinstance(old, dict) else {})
