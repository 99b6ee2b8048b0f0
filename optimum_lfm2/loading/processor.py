"""Read the processor of a checkpoint that takes pictures, and write it for every runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from optimum_lfm2.errors import Lfm2Error, read_object
from optimum_lfm2.graph.tower import ProcessorSettings
from optimum_lfm2.loading.companions import find_file


PREPROCESSOR = "preprocessor_config.json"
PROCESSOR_CONFIG = "processor_config.json"
PROCESSOR_CLASS = "processor_class"
IMAGE_PROCESSOR = "image_processor"  # the key of its settings in PROCESSOR_CONFIG
FILES = (
    PREPROCESSOR,
    PROCESSOR_CONFIG,
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Processor:
    """The processor of a checkpoint that takes pictures.

    Attributes:
        files: its files.
        rules: what its settings have to say.
    """

    files: Sequence[Path]
    rules: ProcessorSettings

    def write(self, folder: Path) -> None:
        """Copy the files, and write the image processor's settings as Transformers.js 4.3 reads them.

        transformers 5 saves the settings within `processor_config.json`. Transformers.js reads
        `preprocessor_config.json` alone. It needs the class of the processor there, and knows fewer defaults than
        transformers.
        """
        written = {}
        for path in self.files:
            (folder / path.name).write_bytes(path.read_bytes())
            if path.suffix == ".json":
                written[path.name] = read_object(path)
        whole = written.get(PROCESSOR_CONFIG, {})
        named = {name: whole[name] for name in (PROCESSOR_CLASS,) if name in whole}
        own = image_settings(written)
        _write(folder / PREPROCESSOR, {**self.rules.defaults, **named, **own, **self.rules.written})
        if self.rules.apart and not whole.get(IMAGE_PROCESSOR):
            of_class = {name: own[name] for name in (PROCESSOR_CLASS,) if name in own}
            _write(folder / PROCESSOR_CONFIG, {**of_class, **whole, IMAGE_PROCESSOR: own})


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def find_processor(
    model_name_or_path: str, config: PretrainedConfig, rules: ProcessorSettings, **hub: Any
) -> Processor:
    """Find the files of a checkpoint's processor, and check its settings.

    Args:
        model_name_or_path: the checkpoint's folder, or its id on the Hub.
        config: the configuration of the whole model.
        rules: what the settings have to say.
        hub: `revision` and the like, as `transformers.utils.cached_file` takes them.

    Raises:
        Lfm2Error: it has no settings of an image processor, they contradict the model, or a file is no JSON object.
    """
    found = [path for name in FILES if (path := find_file(model_name_or_path, name, hub)) is not None]
    written = {path.name: read_object(path) for path in found if path.suffix == ".json"}
    if PREPROCESSOR not in written and not written.get(PROCESSOR_CONFIG, {}).get(IMAGE_PROCESSOR):
        raise Lfm2Error(
            f"{model_name_or_path} has no {PREPROCESSOR}, which says how pictures become patches. "
            "Copy it there from the model that this one was made of."
        )
    name = PREPROCESSOR if PREPROCESSOR in written else f"{IMAGE_PROCESSOR} in {PROCESSOR_CONFIG}"
    settings = {**rules.defaults, **image_settings(written)}
    for field, rule in rules.fields.items():
        if not rule.takes(settings[field]):
            raise Lfm2Error(
                f"{field} in {name} is {str(settings[field])[:60]}; it has to be {rule}. Correct it, or copy it again."
            )
    for field, read in rules.shared.items():
        if settings[field] != read(config):
            raise Lfm2Error(
                f"{field} in {name} is {settings[field]}, and the model's config.json says {read(config)}. "
                "Copy the file of this model there."
            )
    return Processor(found, rules)


def image_settings(written: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of the image processor that are not null.

    Args:
        written: the contents of a processor's JSON files, by their names.

    Raises:
        Lfm2Error: they are no JSON object.
    """
    whole = written.get(PROCESSOR_CONFIG, {})
    settings = written.get(PREPROCESSOR) or whole.get(IMAGE_PROCESSOR) or {}
    if not isinstance(settings, Mapping):
        raise Lfm2Error(f"{IMAGE_PROCESSOR} in {PROCESSOR_CONFIG} is no object of settings. Copy the file again.")
    return {name: value for name, value in settings.items() if value is not None}
