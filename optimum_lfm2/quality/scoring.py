"""The models that `evaluate` compares. An ONNX file or a checkpoint is called with chunks and gives their logits."""

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
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import CONFIG_NAME

from optimum_lfm2.caches import LOGITS_TO_KEEP, head_dim
from optimum_lfm2.errors import Lfm2Error, first_line
from optimum_lfm2.families import member_of
from optimum_lfm2.file_names import DECODER, EMBEDDING, main_files
from optimum_lfm2.loading.config_check import loaded_config
from optimum_lfm2.loading.models import materialize_buffers
from optimum_lfm2.loading.source import is_ours
from optimum_lfm2.loading.tasks_manager import Lfm2TasksManager
from optimum_lfm2.sidecars.genai_config import GENAI_CONFIG, read_genai_config
from optimum_lfm2.validation.pieces import cpu_session
from optimum_lfm2.validation.streamed import StandIns, streamed
from optimum_lfm2.vision_configs import text_model


# A model takes chunks of ids, int64 (1, length) each. For each chunk it yields the logits that are scored, float
# (scored(ids), vocabulary).
Model = Callable[[Sequence[torch.Tensor]], Iterator[torch.Tensor]]

EMBEDS = "inputs_embeds"
TOKENS_A_PASS = 8192  # tokens that go through a streamed layer at a time; bounds the memory of its hidden states
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def scored(ids: torch.Tensor) -> int:
    """Return how many logits of a chunk are scored.

    The second half of the chunk needs the logits before each of its tokens. The logits of the last token are counted
    too, though nothing is compared with them.

    Args:
        ids: the chunk, int64 (1, length).
    """
    return ids.shape[1] - ids.shape[1] // 2 + 1


def load(path: Path) -> Model:
    """Load an ONNX file, a folder that holds one, or a checkpoint.

    Raises:
        Lfm2Error: the path holds none of these or several ONNX files, or the model cannot be loaded.
    """
    file = onnx_file(path)
    return OnnxModel(file) if file else _transformers_model(path)


def onnx_file(path: Path) -> Path | None:
    """Find an ONNX file: the path itself, or the only one in a folder and its subfolder `onnx`. None for a checkpoint.

    Of a model in parts it is the decoder.

    Raises:
        Lfm2Error: the path does not exist, or there are several files.
    """
    check_exists(path)
    if path.is_file():
        return path
    files = main_files([*path.glob("*.onnx"), *path.glob("onnx/*.onnx")])
    files = [file for file in files if file.name.startswith(DECODER)] or files
    if len(files) > 1:
        raise Lfm2Error(f"{path} holds several models. Give one of them: {', '.join(map(str, files))}.")
    return files[0] if files else None


def check_exists(path: Path) -> None:
    """Raise `Lfm2Error` for a path of a model that does not exist."""
    if not path.exists():
        raise Lfm2Error(f"{path} does not exist. Give an exported folder, an .onnx file or a checkpoint's folder.")


class OnnxModel:
    """An ONNX decoder, by this exporter or another, with cache inputs or without. Every chunk starts on empty caches.

    Args:
        path: the ONNX file. The embedding lies beside a decoder that takes `inputs_embeds`.

    Raises:
        Lfm2Error: the file cannot be loaded or has no output `logits`. Calling the model raises it where the graph
            fails or gives too few logits.
    """

    def __init__(self, path: Path) -> None:
        self._session = open_session(path)
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._path = path
        self._embedding: Any = open_session(_embedding_of(path)) if EMBEDS in self._inputs else None
        if "logits" not in (output.name for output in self._session.get_outputs()):
            raise Lfm2Error(f"{path} has no output named logits. Export it for text-generation.")

    def __call__(self, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for ids in chunks:
            (logits,) = self.run(["logits"], ids)
            if logits.shape[1] < scored(ids):
                raise Lfm2Error(
                    f"{self._path} gives {logits.shape[1]} logits, but {scored(ids)} are needed. Export it without "
                    "pruning the head."
                )
            yield torch.from_numpy(logits[0, -scored(ids) :])

    def run(self, outputs: Sequence[str], ids: torch.Tensor) -> list[np.ndarray]:
        """Run the graph on empty caches.

        Args:
            outputs: the names of the outputs to return. A graph that can limit its logits computes the scored ones.
            ids: int64 (1, length).

        Raises:
            Lfm2Error: the graph fails.
        """
        feeds = {name: self._feed(value, ids) for name, value in self._inputs.items()}
        try:
            return self._session.run(outputs, feeds)
        except Exception as error:  # onnxruntime's errors have no common class of their own
            raise Lfm2Error(
                f"{self._path} cannot run on empty caches ({first_line(error)}). Export it again."
            ) from None

    def _feed(self, value: Any, ids: torch.Tensor) -> np.ndarray:
        if value.name == "input_ids":
            return ids.numpy()
        if value.name == EMBEDS:
            return self._embedding.run([EMBEDS], {"input_ids": ids.numpy()})[0]
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
        raise Lfm2Error(
            f"{self._path} has an input {value.name}, which is not supported here. "
            "Give a text-generation model whose inputs are ids, mask, positions and caches."
        )

    def _head_dim(self) -> int:
        """Read the width of the heads from a configuration file beside the graph.

        onnxruntime-genai's builder writes a symbol for this axis of the KV cache.
        """
        for folder in list(self._path.absolute().parents)[:2]:
            if (folder / CONFIG_NAME).is_file():
                return head_dim(loaded_config(folder))
            if (folder / GENAI_CONFIG).is_file():
                return head_dim(read_genai_config(folder))
        raise Lfm2Error(
            f"{self._path} does not say how wide its heads are. Copy the checkpoint's {CONFIG_NAME} beside it."
        )


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Open an ONNX file on the CPU.

    Raises:
        Lfm2Error: onnxruntime cannot load it.
    """
    try:
        # torch computes between the calls, and onnxruntime's threads would hold the cores while they spin.
        return cpu_session(path, {"session.intra_op.allow_spinning": "0"})
    except Exception as error:  # onnxruntime's errors have no common class of their own
        raise Lfm2Error(f"{path} cannot be loaded ({' '.join(str(error).split())}). Export it again.") from None


def _embedding_of(decoder: Path) -> Path:
    """Return the file of the embedding that belongs to a decoder."""
    path = decoder.with_name(decoder.name.replace(DECODER, EMBEDDING))
    if path == decoder or not path.is_file():
        raise Lfm2Error(f"{decoder} takes {EMBEDS}, and has no {EMBEDDING} beside it. Give a whole exported folder.")
    return path


def _transformers_model(folder: Path) -> Model:
    try:
        if is_ours(folder):
            member = member_of(loaded_config(folder))
            task = Lfm2TasksManager.infer_task_from_model(str(folder)) if member.in_parts else "text-generation"
            return reference_model(Lfm2TasksManager.get_model_from_task(task, str(folder), torch_dtype=torch.float32))
        return _WholeModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    except Lfm2Error:
        raise
    except (OSError, ValueError) as error:
        raise Lfm2Error(
            f"{folder} holds neither an ONNX file nor a checkpoint ({first_line(error)}). Give a folder that does."
        ) from None


def reference_model(model: Any) -> Model:
    """Wrap a float32 model of `Lfm2TasksManager` as a reference for `measure`. It is read layer by layer.

    Of a model that takes pictures too, the decoder is the reference.
    """
    if member_of(model.config).in_parts:
        model = text_model(model)
    return _StreamedModel(model, model.checkpoint)


class _WholeModel:
    """A model of transformers with all of its weights in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @torch.no_grad()
    def __call__(self, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for ids in chunks:
            yield self._model(input_ids=ids, use_cache=False, logits_to_keep=scored(ids)).logits[0]


class _StreamedModel:
    """A model of transformers on the meta device, whose layers are loaded one at a time.

    Many chunks go through a layer while its weights are in memory. The final hidden states of the scored tokens are
    kept. So the weights are read once, even if several models are compared on the same chunks.
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
        factor = member_of(self._model.config).factors(self._model.config).logits
        for hidden in self._hidden:
            yield F.linear(hidden, head) * factor

    def _read(self, chunks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return, for each chunk, the final hidden states of the scored tokens, float (scored(ids), hidden_size)."""
        groups = torch.cat(list(chunks)).split(max(1, TOKENS_A_PASS // chunks[0].shape[1]))
        total, count = len(groups) * len(self._model.base_model.layers), scored(chunks[0])
        with tqdm(total=total, desc="Reference", unit="layer", disable=None, leave=False) as bar:
            states = (hidden for group in groups for hidden in self._hidden_states(group, bar))
            return [hidden[-count:].clone() for hidden in states]

    def _hidden_states(self, ids: torch.Tensor, bar: tqdm) -> torch.Tensor:
        def count(*_: Any) -> None:
            bar.update()

        with streamed(self._model, self._weights), ExitStack() as stack:
            for layer in self._model.base_model.layers:
                stack.callback(layer.register_forward_hook(count).remove)
            return self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
