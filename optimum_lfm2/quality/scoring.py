"""Models as `evaluate` reads them: an ONNX file, or a checkpoint, gives the logits to score of chunks of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import CONFIG_NAME

from optimum_lfm2 import compat
from optimum_lfm2.caches import LOGITS_TO_KEEP, head_dim, with_float_caches
from optimum_lfm2.errors import Lfm2Error, first_line
from optimum_lfm2.export.loading import Lfm2TasksManager, materialize_buffers
from optimum_lfm2.export.streamed import StandIns, streamed
from optimum_lfm2.genai_config import GENAI_CONFIG, read_genai_config


# chunks, ids (1, length) each → of each in turn the logits to score, float (scored(ids), vocabulary)
Model = Callable[[Sequence[torch.Tensor]], Iterator[torch.Tensor]]

MOE = "lfm2_moe"
TOKENS_A_PASS = 8192  # through a model that is read layer by layer: bounds the memory of what a layer computes
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def scored(ids: torch.Tensor) -> int:
    """How many logits the second half of a chunk takes: those before each of its tokens, and after the last."""
    return ids.shape[1] - ids.shape[1] // 2 + 1


def load(path: Path) -> Model:
    """The model of an ONNX file, of a folder that holds one, or of a checkpoint.

    Raises:
        Lfm2Error: for a path that holds none of these, or several ONNX files.
    """
    if not path.exists():
        raise Lfm2Error(f"{path} does not exist. Give an exported folder, an .onnx file or a checkpoint's folder.")
    if path.is_file():
        return OnnxModel(path)
    file = onnx_file(path)
    return OnnxModel(file) if file else _transformers_model(path)


def onnx_file(folder: Path) -> Path | None:
    """The only ONNX file of a folder and its `onnx` folder; None for none. Raises `Lfm2Error` for several."""
    files = with_float_caches([*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")])
    if len(files) > 1:
        raise Lfm2Error(f"{folder} holds several models. Give one of them: {', '.join(map(str, files))}.")
    return files[0] if files else None


class OnnxModel:
    """A decoder with or without caches, of this package or others': the caches start out empty."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # torch computes between the calls: threads that spin would hold the cores
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class for each status, and no common one
            raise Lfm2Error(f"{path} cannot be loaded ({' '.join(str(error).split())}). Export it again.") from None
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._path = path
        if "logits" not in (output.name for output in self._session.get_outputs()):
            raise Lfm2Error(f"{path} has no output named logits. Export it for text-generation.")

    def __call__(self, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for ids in chunks:
            (logits,) = self.run(["logits"], ids)
            if logits.shape[1] < scored(ids):
                raise Lfm2Error(
                    f"{self._path} gives {logits.shape[1]} logits where {scored(ids)} are scored. Export it without "
                    "pruning the head."
                )
            yield torch.from_numpy(logits[0, -scored(ids) :])

    def run(self, outputs: Sequence[str], ids: torch.Tensor) -> list[np.ndarray]:
        """The outputs of these names for ids (1, length) on empty caches; of logits, those to score."""
        feeds = {name: self._feed(value, ids) for name, value in self._inputs.items()}
        try:
            return self._session.run(outputs, feeds)
        except Exception as error:  # as above
            raise Lfm2Error(f"{self._path} fails on a text with empty caches ({first_line(error)}).") from None

    def _feed(self, value: Any, ids: torch.Tensor) -> np.ndarray:
        if value.name == "input_ids":
            return ids.numpy()
        if value.name == "attention_mask":
            return np.ones(ids.shape, dtype=np.int64)
        if value.name == "position_ids":
            return np.arange(ids.shape[1], dtype=np.int64)[None]
        if value.name == LOGITS_TO_KEEP:
            return np.array(scored(ids), dtype=np.int64)
        if value.name.startswith("past") and value.type in DTYPES:
            shape = [axis if isinstance(axis, int) else int(axis == value.shape[0]) for axis in value.shape]
            if len(shape) == 4 and not isinstance(value.shape[3], int):
                shape[3] = self._head_dim()
            return np.zeros(shape, dtype=DTYPES[value.type])
        raise Lfm2Error(f"{self._path} has an input {value.name}, which no language model's export that we know has.")

    def _head_dim(self) -> int:
        """For a graph that has a symbol there, as onnxruntime-genai's builder writes it."""
        for folder in list(self._path.absolute().parents)[:2]:
            if (folder / CONFIG_NAME).is_file():
                return head_dim(AutoConfig.from_pretrained(folder))
            if (folder / GENAI_CONFIG).is_file():
                return head_dim(read_genai_config(folder))
        raise Lfm2Error(f"{self._path} does not say how wide its heads are. Copy the checkpoint's {CONFIG_NAME} there.")


def _transformers_model(folder: Path) -> Model:
    try:
        config = AutoConfig.from_pretrained(folder)
        compat.check_model_type(config.model_type)
        if config.model_type == MOE:
            task = "text-generation"
            return reference_model(Lfm2TasksManager.get_model_from_task(task, str(folder), torch_dtype=torch.float32))
        compat.spell_rope_for_both(config)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    except Lfm2Error:
        raise
    except (OSError, ValueError) as error:
        raise Lfm2Error(f"{folder} holds neither an ONNX file nor a checkpoint ({first_line(error)}).") from None
    return _WholeModel(model)


def reference_model(model: Any) -> Model:
    """A model of `Lfm2TasksManager`, in float32: read as a whole, but for experts, which may be larger than memory."""
    weights = getattr(model, "checkpoint", None)
    if model.config.model_type == MOE and weights is not None:
        return _StreamedModel(model, weights)
    return _WholeModel(model.to("cpu"))


class _WholeModel:
    """A model of transformers, as it is."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @torch.no_grad()
    def __call__(self, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for ids in chunks:
            yield self._model(input_ids=ids, use_cache=False, logits_to_keep=scored(ids)).logits[0]


class _StreamedModel:
    """A model of transformers on the meta device: many chunks go through each layer while its weights are there.

    They are read once, however many models are compared on the same chunks: the hidden states that are scored stay.
    """

    def __init__(self, model: Any, weights: Mapping[str, Any]) -> None:
        materialize_buffers(model)
        self._model = model
        self._weights = StandIns(model, weights, scheme=None)
        self._chunks: Sequence[torch.Tensor] | None = None
        self._hidden: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        if self._chunks is not chunks:
            self._chunks, self._hidden = chunks, self._read(chunks)
        head = self._weights["lm_head.weight"]
        for hidden in self._hidden:
            yield F.linear(hidden, head)

    def _read(self, chunks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of each chunk the hidden states whose logits are scored."""
        groups = torch.cat(list(chunks)).split(max(1, TOKENS_A_PASS // chunks[0].shape[1]))
        total, count = len(groups) * len(self._model.model.layers), scored(chunks[0])
        with tqdm(total=total, desc="Reference", unit="layer", disable=None, leave=False) as bar:
            states = (hidden for group in groups for hidden in self._hidden_states(group, bar))
            return [hidden[-count:].clone() for hidden in states]

    def _hidden_states(self, ids: torch.Tensor, bar: tqdm) -> torch.Tensor:
        def count(*_: Any) -> None:
            bar.update()

        with streamed(self._model, self._weights), ExitStack() as stack:
            for layer in self._model.model.layers:
                stack.callback(layer.register_forward_hook(count).remove)
            return self._model.model(input_ids=ids, use_cache=False).last_hidden_state
