"""Find the graph, the weights and the settings of an exported folder, and refuse files that cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from optimum.onnxruntime.constants import ONNX_WEIGHTS_NAME
from transformers import GenerationConfig

from optimum_lfm2.errors import Lfm2Error, first_line
from optimum_lfm2.file_names import main_files
from optimum_lfm2.loading.companions import generation_settings


# Bytes of a graph. A larger one is not read for the names of its weight files, since that takes long.
LARGEST_WITHOUT_WEIGHTS = 2**26
# What onnxruntime raises for a file that is no graph, or not one that it can run.
GRAPH_ERRORS = tuple(
    getattr(ort_errors, name)
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
)


@dataclass(frozen=True)
class FileIdentity:
    """The identity of a model's files. A newer export in the same place has another identity.

    Fine-tunes may have the same graph, byte for byte. So the weight files count too.

    Attributes:
        files: path, size and time of change in ns, of the graph first and then of the weights beside it.
    """

    files: tuple[tuple[Path, int, int], ...]

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """Return the identity of a graph. Links to the same files, as in the Hub's cache, have the same identity."""
        found = [file.resolve() for file in (path, *_weight_files(path))]
        return cls(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in found))

    @property
    def path(self) -> Path:
        """The graph."""
        return self.files[0][0]


def _weight_files(path: Path) -> list[Path]:
    """Return the files beside a graph that hold its weights. A large graph holds them itself."""
    if path.stat().st_size > LARGEST_WITHOUT_WEIGHTS:
        return []
    tensors = onnx.load_model(path, load_external_data=False).graph.initializer
    names = {ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}
    return [file for name in sorted(names) if (file := path.parent / name).is_file()]


def only_file(folder: Path) -> str | None:
    """Return the name of a local folder's only model. Return None where Optimum finds model.onnx or asks the Hub.

    Raises:
        Lfm2Error: there are several models, and none has that name. Optimum would take any of them.
    """
    names = [path.name for path in main_files(folder.rglob("*.onnx"))]
    if not names or ONNX_WEIGHTS_NAME in names:
        return None
    if len(names) > 1:
        raise Lfm2Error(f'{folder} holds {", ".join(names)}. Choose one, such as file_name="{names[0]}".')
    return names[0]


def generation_config_of(model_id: str | Path, subfolder: str, kwargs: dict[str, Any]) -> GenerationConfig | None:
    """Read the generation settings in the model's subfolder or beside it. Optimum looks into the subfolder alone."""
    hub = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    options = {name: kwargs[name] for name in hub if name in kwargs}
    folders = dict.fromkeys((subfolder, ""))
    found = (generation_settings(str(model_id), subfolder=folder, **options) for folder in folders)
    settings: Any = next((settings for settings in found if settings is not None), None)
    # The file's bytes are for an export, which carries them over. Here the settings may be changed and saved.
    if settings is not None:
        settings.__class__ = GenerationConfig
        del settings.written
    return settings


def save_session(part: Any, folder: Path) -> None:
    """Copy the files of a session of Optimum into a folder. Those that are there already stay."""
    own = Path(part.session._model_path)
    target = folder / own.name
    if not (target.exists() and target.samefile(own)):  # which Optimum would copy onto itself
        part.save_session(folder)


@contextmanager
def refused_graphs(path: Path) -> Iterator[None]:
    """Within the `with` block, raise `Lfm2Error` where onnxruntime cannot load a file."""
    try:
        yield
    except GRAPH_ERRORS as error:
        raise Lfm2Error(
            f"onnxruntime cannot load {path} ({first_line(error)}). Download or copy it again, with the file of its "
            "weights beside it, or export the checkpoint again."
        ) from error
