"""The model card of a published folder. It shows how to run the files and how much quality each precision loses."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers.utils import CONFIG_NAME, cached_file

from optimum_lfm2.errors import read_object
from optimum_lfm2.families import member_of
from optimum_lfm2.file_names import DECODER, EMBEDDING, VISION
from optimum_lfm2.graph.member import Member
from optimum_lfm2.publish.kinds import kind_of
from optimum_lfm2.publish.precisions import PRECISIONS, Published
from optimum_lfm2.publish.table import Column, file_table
from optimum_lfm2.report import megabytes, repository
from optimum_lfm2.sidecars.genai_config import GENAI_CONFIG


CARD = "README.md"
LICENSE = "LICENSE"
LICENSE_FIELDS = ("license", "license_name", "license_link", "language")
TAGS = ["onnx", "onnxruntime"]
GENAI = "onnxruntime-genai"
JAVASCRIPT = "transformers.js"
SENTENCE_TRANSFORMERS = "sentence-transformers"

COLUMNS: tuple[Column, ...] = (
    ("precision", lambda file: file.precision),
    ("file", lambda file: f"`onnx/{file.path.name}`"),
    ("MB", lambda file: megabytes(file.size)),
    ("weights", lambda file: PRECISIONS[file.precision].weights),
    ("checked within", lambda file: f"{file.difference:.2g}"),
    ("good for", lambda file: PRECISIONS[file.precision].use),
)

# Markdown, with the names that the values in `_values` and its like have. A name without a value is an error.
TEMPLATES = Environment(
    loader=PackageLoader("optimum_lfm2.publish"), undefined=StrictUndefined, keep_trailing_newline=True
)


@dataclass(frozen=True)
class CardOptions:
    """What the user wants the card to say. None takes the value of the folder's older card or of the checkpoint's card.

    Attributes:
        repo_id: the id on the Hub that the examples load.
        base_model: the checkpoint's id on the Hub.
        license: the checkpoint's licence.
    """

    repo_id: str | None
    base_model: str | None
    license: str | None


@dataclass(frozen=True)
class Card:
    """What a written model card says.

    Attributes:
        name: the id on the Hub that its examples load, or the folder's name.
        license: the licence; None where it names none.
    """

    name: str
    license: str | None


def write_card(folder: Path, files: list[Published], old: Path, model: str, options: CardOptions, **hub: Any) -> Card:
    """Write README.md, and copy the checkpoint's LICENSE. Return what the card says.

    Args:
        folder: the folder to write to. It has the tokenizer.
        files: the ONNX files that the published folder will have.
        old: the published folder before this run.
        model: the checkpoint's folder, or its id on the Hub.
        options: what the user wants the card to say.
        hub: arguments of `transformers.utils.cached_file`, such as `cache_dir`.
    """
    before = _load(old / CARD)
    license_ = _checkpoint_file(model, LICENSE, hub)
    if license_ is not None and _is_of(license_, model):
        shutil.copyfile(license_, folder / LICENSE)
    data = _data(model, before, _load(_checkpoint_file(model, CARD, hub)), options)
    config = read_object(folder / CONFIG_NAME)
    member = member_of(config)
    task = member.task(config.get("architectures"))
    data.pipeline_tag = task
    data.tags = _tags(member, (folder / GENAI_CONFIG).is_file())
    if any(_javascript_reads(file) for file in files):
        data.library_name = JAVASCRIPT  # the Hub shows how to load this layout under this library's name
        data.tags = [*data.tags, JAVASCRIPT]
    name = options.repo_id or _repo_id(before) or old.resolve().name
    values = _values(folder, files, name, data, member)
    kind = kind_of(member)
    values |= kind.values(folder, files, kind.preferred(files), task)
    if values.get("pooled"):
        data.library_name, data.pipeline_tag = SENTENCE_TRANSFORMERS, "sentence-similarity"
        data.tags = [*data.tags, SENTENCE_TRANSFORMERS]
    text = TEMPLATES.get_template(kind.template).render(values, card_data=data.to_yaml())
    ModelCard(text).save(folder / CARD)
    return Card(name, data.license)


def _tags(member: Member, genai: bool) -> list[str]:
    return [member.model_type, *TAGS, *([GENAI] if genai else []), "optimum"]


def _javascript_reads(file: Published) -> bool:
    """Return whether Transformers.js 4.3 can run the file, as a dtype or by its name.

    It takes a name for a model in one file alone. It knows only the Hub's cache names, and its onnxruntime is 1.30,
    whose `QMoE` does not round activations.
    """
    runs = file.cache_names == "hub" and not file.rounds_in_experts
    return runs and (PRECISIONS[file.precision].is_dtype or not file.parts)


def _load(path: Path | None) -> ModelCard | None:
    """Load a card. Return None where there is no card or it cannot be read."""
    if path is None or not path.is_file():
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True)
    except ValueError:
        return None


def _checkpoint_file(model: str, name: str, hub: dict[str, Any]) -> Path | None:
    path = cached_file(model, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if path is None else Path(path)


def _is_of(path: Path, model: str) -> bool:
    """Return whether a checkpoint's file lies in its folder. A link out of a local folder may lead to private files."""
    if not Path(model).is_dir():
        return True
    folder, target = Path(model).resolve(), path.resolve()
    # The Hub's cache keeps a snapshot's files beside it, as links.
    blobs = [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []
    return any(target.is_relative_to(place) for place in (folder, *blobs))


def _repo_id(card: ModelCard | None) -> str | None:
    """Return the heading of an earlier run's card if it is an id on the Hub."""
    found = re.search(r"^# ([\w.-]+/[\w.-]+)$", card.text, flags=re.MULTILINE) if card else None
    return found[1] if found else None


def _data(model: str, before: ModelCard | None, own: ModelCard | None, options: CardOptions) -> ModelCardData:
    """Collect the card's metadata. The user's word comes first, then the older card's, then the checkpoint's."""
    # The `base_model` of the checkpoint's card is left out. It names the model that the checkpoint was made of, and the
    # base model of this export is the checkpoint.
    sources = ((own, LICENSE_FIELDS), (before, (*LICENSE_FIELDS, "base_model")))
    fields = {name: value for card, names in sources if card for name in names if (value := card.data.get(name))}
    if not Path(model).is_dir():
        fields["base_model"] = model
    given = {"base_model": options.base_model, "license": options.license}
    fields |= {name: value for name, value in given.items() if value is not None}
    if "base_model" in fields:
        fields["base_model_relation"] = "quantized"  # the Hub calls every conversion so
    return ModelCardData(**fields)


def _values(folder: Path, files: list[Published], name: str, data: ModelCardData, member: Member) -> dict[str, Any]:
    """Return the values that the template asks for."""
    tokenizer = read_object(folder / "tokenizer_config.json")
    kind = kind_of(member)
    chosen = kind.preferred(files)
    online = "/" in name  # an id on the Hub, not the name of a folder
    read = [file for file in files if _javascript_reads(file)]
    genai = (folder / GENAI_CONFIG).is_file()
    return {
        "name": name,
        "model_type": member.model_type,
        "title": member.title,
        "genai": genai,
        "page": member.page or member.model_type,
        "loader": member.loader,
        "unknown": member.genai_type is None and not genai,
        "base_model": data.base_model,
        "license": _license(data),
        "repository": repository(),
        "extras": kind.extras,
        "file": chosen.path.name,
        # The JavaScript example takes the same file if Transformers.js can run it, else the smallest one that it can.
        "javascript": (chosen if chosen in read else min(read, key=lambda file: file.size)).precision if read else None,
        "unread": " or ".join(file.precision for file in files if file.rounds_in_experts),
        "by_name": [file.precision for file in files if not PRECISIONS[file.precision].is_dtype],
        "chat": "chat_template" in tokenizer,
        "folder": f'snapshot_download("{name}")' if online else f'"{name}"',
        "download": "\nfrom huggingface_hub import snapshot_download" if online else "",
        "table": file_table(files, COLUMNS),
        "compared": list(dict.fromkeys((_part(part), part.compared) for file in files for part in file.all)),
        "qualities": list(dict.fromkeys(file.quality.measured(file.text) for file in files if file.quality)),
    }


def _license(data: ModelCardData) -> str | None:
    """Return the licence in Markdown, with a link where the checkpoint's card has one."""
    name = data.get("license_name") or data.license
    return f"[{name}]({data.license_link})" if name and data.get("license_link") else name


def _part(file: Published) -> str:
    names = {DECODER: "Each decoder", EMBEDDING: "Each embedding", VISION: "Each vision encoder"}
    return next((name for part, name in names.items() if file.path.name.startswith(part)), "Each file")
