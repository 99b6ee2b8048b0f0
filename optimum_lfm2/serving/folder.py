"""Load an exported folder to talk to: the model, its tokenizer, and its processor where it takes pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error, first_line, read_object
from optimum_lfm2.families import MODEL_TYPES, member_of
from optimum_lfm2.file_names import ONNX_FOLDER
from optimum_lfm2.modeling import ORTLfm2ForCausalLM
from optimum_lfm2.vision_modeling import VISION_CLASSES


TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Loaded:
    """A model of ours, ready to generate.

    Attributes:
        model: an `ORTLfm2ForCausalLM`, or the class that sees.
        tokenizer: its tokenizer.
        processor: transformers' processor of text and pictures, or None for a model of text.
    """

    model: ORTLfm2ForCausalLM
    tokenizer: PreTrainedTokenizerBase
    processor: Any


def load_folder(folder: Path, file_name: str | None = None, session_options: Any = None) -> Loaded:
    """Load a folder of `export onnx` or `export lfm2`.

    Args:
        folder: the exported folder.
        file_name: the model's file, in the folder or its subfolder `onnx`. None takes `model.onnx`, or the only one.
        session_options: onnxruntime's, such as how many threads the model takes.

    Raises:
        Lfm2Error: it is no export of ours, it lacks a file, or it holds several models and none is chosen.
    """
    config = _checked(folder)
    member = member_of(config)
    sees = member.in_parts
    if sees:
        compat.check_processor(member.model_type)
    where: dict[str, Any] = {} if file_name is None else _located(folder, file_name)
    if session_options is not None:
        where["session_options"] = session_options
    if sees:
        model = VISION_CLASSES[member.loader].from_pretrained(folder, **where)
    else:
        model = ORTModelForCausalLM.from_pretrained(folder, **where)
    if not model.can_use_cache:
        raise Lfm2Error(
            f"{model.path} has no cache inputs, so each token would read the whole text again. Export it for "
            "text-generation-with-past."
        )
    return Loaded(model, AutoTokenizer.from_pretrained(folder), _processor(folder) if sees else None)


def _checked(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json. Raise `Lfm2Error` for what is no export of ours."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise Lfm2Error(f"{folder} {what}. Give the folder that optimum-cli export onnx or export lfm2 wrote.")
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise Lfm2Error(f"{folder} has no {CONFIG_NAME}. Give the folder that optimum-cli export wrote.")
    config = read_object(path)
    if config.get("model_type") not in MODEL_TYPES:
        raise Lfm2Error(
            f"{folder} holds a model of the type {config.get('model_type')}. These commands run LFM2 and its relatives."
        )
    if not any(folder.glob("*.onnx")) and not any((folder / ONNX_FOLDER).glob("*.onnx")):
        raise Lfm2Error(
            f"{folder} holds no ONNX file. If it is a checkpoint, export it first: "
            f"optimum-cli export onnx --model {folder} OUT"
        )
    if not (folder / TOKENIZER).is_file():
        raise Lfm2Error(f"{folder} has no {TOKENIZER}. Copy the files of the tokenizer there from the checkpoint.")
    return config


def _located(folder: Path, file_name: str) -> dict[str, Any]:
    """Return the file, and the subfolder that has it, as `from_pretrained` takes them."""
    name = Path(file_name).name
    for subfolder in ("", ONNX_FOLDER):
        if (folder / subfolder / name).is_file():
            return {"file_name": name, "subfolder": subfolder}
    found = sorted(path.name for path in (*folder.glob("*.onnx"), *folder.glob(f"{ONNX_FOLDER}/*.onnx")))
    raise Lfm2Error(f"{folder} has no {file_name}. It has {', '.join(found)}.")


def _processor(folder: Path) -> Any:
    """Return transformers' processor. Its pictures need packages that its text does not."""
    try:
        return AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        raise Lfm2Error(
            "Pictures need pillow and a torchvision built for the installed torch: pip install pillow torchvision "
            f"({first_line(error)})."
        ) from error
