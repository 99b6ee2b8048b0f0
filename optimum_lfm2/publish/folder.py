"""Write one folder that several runtimes read: an ONNX file per precision, their configuration, and a model card."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from optimum.exporters.onnx import convert
from optimum.exporters.tasks import TasksManager
from optimum.utils.save_utils import maybe_save_preprocessors
from transformers import AutoTokenizer

from optimum_lfm2.configs import DTYPES
from optimum_lfm2.errors import Lfm2Error, read_object
from optimum_lfm2.export.staging import staged
from optimum_lfm2.file_names import DECODER, EMBEDDING, ONNX_FOLDER
from optimum_lfm2.loading.source import Source
from optimum_lfm2.loading.tasks_manager import Lfm2TasksManager
from optimum_lfm2.metadata import CHECKPOINT, COMPARED, DIFFERENCE, QUALITY, TEXT
from optimum_lfm2.publish.card import Card, write_card
from optimum_lfm2.publish.job import LEAST_COSINE, Job
from optimum_lfm2.publish.precisions import (
    LAYOUTS,
    PRECISIONS,
    Precision,
    Published,
    annotate,
    published,
)
from optimum_lfm2.quality.evaluate import read_chunks
from optimum_lfm2.quality.similarity import Similarity
from optimum_lfm2.report import WITH_PAST
from optimum_lfm2.sidecars.folder import write_sidecars
from optimum_lfm2.sidecars.genai_config import write_genai_config
from optimum_lfm2.sidecars.js_config import JS_CONFIG, declare_external_data
from optimum_lfm2.weights.checkpoint import find_tensors, fingerprint


# The traced graph is the same for any shape. A small one is chosen since a CPU is slow in half precision.
TRACED = {"batch_size": 1, "sequence_length": 2}
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        files: the precisions that the folder has now, those of earlier runs too.
        card: what the model card says.
        failed: a line for each precision that failed. The folder does not contain these.
    """

    files: list[Published]
    card: Card
    failed: list[str]


def publish(job: Job) -> Outcome:
    """Write the requested precisions into the folder, each after a check against transformers.

    Precisions that the folder has already stay there.

    Raises:
        Lfm2Error: the checkpoint cannot be exported, the folder belongs to another checkpoint, or every precision
            failed. The folder stays as it was.
    """
    with staged(job.output) as folder:
        source = _save_configuration(job, folder)
        checkpoint = fingerprint(find_tensors(job.model, cache_dir=job.cache_dir))
        _check_output(job, folder, checkpoint)
        text = _read_text(job, folder)
        failed = _write_files(job, folder, checkpoint)
        if text is not None:
            failed += _measure(job, folder, text, Path(job.text or "").name)
        if not published(folder):
            raise Lfm2Error("\n".join(failed))
        files = published(job.output, folder)
        _declare_external_data(job, folder, files)
        chosen = job.kind.preferred(files)
        parts = chosen.by_part or {DECODER: chosen.path}
        write_genai_config(
            folder, ONNX_FOLDER, parts[DECODER], source.config, source.member, chosen.caches, parts.get(EMBEDDING)
        )
        card = write_card(folder, files, job.output, job.model, job.card, cache_dir=job.cache_dir)
    return Outcome(published(job.output), card, failed)


def _save_configuration(job: Job, folder: Path) -> Source:
    """Write config.json, generation_config.json, and the files of tokenizer and processor, for every runtime."""
    source = Source.open(job.model, cache_dir=job.cache_dir)
    if job.task.removesuffix(WITH_PAST) != source.task:
        raise Lfm2Error(
            f"{job.model} has no language modelling head. Use optimum-cli export onnx --task feature-extraction."
        )
    model = _load(job, "fp32")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    config = source.config
    for own, loaded in ((config, model.config), (config.get_text_config(), model.config.get_text_config())):
        own.tie_word_embeddings = loaded.tie_word_embeddings  # the stored tensors decide it
    config.save_pretrained(folder)
    maybe_save_preprocessors(job.model, folder)
    if not (folder / TOKENIZER).is_file():
        raise Lfm2Error(f"{job.model} has no tokenizer, and every runtime needs one. Copy {TOKENIZER} there.")
    write_sidecars(folder, source, source.member, source.task)
    return source


def _check_output(job: Job, folder: Path, checkpoint: str) -> None:
    """Refuse a folder whose files are of another checkpoint or name their caches differently."""
    if (job.output / "model.onnx").exists():
        raise Lfm2Error(f"{job.output} has a model.onnx of optimum-cli export onnx. Give another folder.")
    present = published(job.output)
    for file in present:
        if "" in (part.checkpoint for part in file.all):
            raise Lfm2Error(f"{file.path} is no file of optimum-cli export lfm2. Give another folder.")
    old, new = (_read_config(path) for path in (job.output, folder))
    if old and (different := sorted(name for name in old.keys() & new.keys() if old[name] != new[name])):
        raise Lfm2Error(
            f"{job.output} holds another model: {', '.join(different)} differ in its config.json. Give another folder."
        )
    for file in present:
        if any(part.checkpoint != checkpoint for part in file.all):
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
            try:
                for path, notes in _write_precision(job, model, precision, job.variant(name), folder / ONNX_FOLDER):
                    annotate(path, {CHECKPOINT: checkpoint, **notes})
            except Lfm2Error as error:
                failed.append(_removed(name, folder, error))
                continue
            print(f"{name}: written and checked", flush=True)
        del model
        gc.collect()
    return failed


def _removed(name: str, folder: Path, error: Lfm2Error) -> str:
    """Remove the files of a precision that failed, and return the line that reports it."""
    for part in chain.from_iterable(LAYOUTS):
        for written in folder.glob(f"{ONNX_FOLDER}/{PRECISIONS[name].named(part)}*"):
            written.unlink()
    return f"{name}: {' '.join(str(error).split())}"


def _load(job: Job, dtype: str) -> Any:
    return Lfm2TasksManager.get_model_from_task(
        job.task, job.model, torch_dtype=DTYPES[dtype], cache_dir=job.cache_dir, library_name="transformers"
    )


def _write_precision(
    job: Job, model: Any, precision: Precision, variant: str, folder: Path
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Export the files of a precision and check them. Yield each with what its check found, for its metadata."""
    task, cached = job.task.removesuffix(WITH_PAST), job.task.endswith(WITH_PAST)
    constructor: Any = TasksManager.get_exporter_config_constructor(
        "onnx", model=model, task=job.task, library_name="transformers"
    )
    whole = constructor.func(
        model.config, task=task, float_dtype=precision.dtype, use_past=cached, use_past_in_inputs=cached
    )
    whole.variant = variant
    for name, (part, config) in whole.parts(model).items():
        path = folder / precision.named(name)
        # Transformers.js 4.3 and onnxruntime-genai 0.18 feed `num_logits_to_keep` only where it has no default. With a
        # default, a browser would compute the logits of the whole prompt and run out of memory.
        options = {"num_logits_to_keep": "required", "cache_names": job.cache_names} if config.use_past else {}
        config.know_weights(part)
        if config.scheme is not None:
            # Builds of onnxruntime for the browser have no kernel for the fused embedding (see `EMBEDDINGS`).
            options["embedding"] = "portable"
        if config.use_past:
            config.read_options(options, part)  # Optimum makes dummy inputs before it hands them on
        given = {"dtype": precision.dtype, "input_shapes": dict(TRACED), "model_kwargs": dict(options)}
        convert.export(part, config, path, **given)
        differences = config.validate(part, path, job.atol)
        yield path, {DIFFERENCE: repr(max(differences.values())), COMPARED: config.COMPARISON}


def _measure(job: Job, folder: Path, text: list[torch.Tensor], name: str) -> list[str]:
    """Compare each file with the checkpoint in float32 on a text of this name. Return a line per failure.

    The result is noted in the file.
    """
    failed: list[str] = []
    files = published(folder)
    if not files:
        return failed
    model = _load(job, "fp32")
    compare = job.kind.comparison(model)
    for file in files:
        try:
            quality = compare(file.path, text)
            if isinstance(quality, Similarity) and file.precision in job.kind.measured:
                _check_similarity(quality)
        except Lfm2Error as error:
            failed.append(_removed(file.precision, folder, error))
            continue
        annotate(file.path, {QUALITY: json.dumps(quality.as_dict()), TEXT: name})
        print(f"{file.precision}: compared with the checkpoint on {name}", flush=True)
    return failed


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
    declare_external_data(
        folder, [part.path for file in files for part in file.all], old if isinstance(old, dict) else {}
    )
