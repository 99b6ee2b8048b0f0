"""The tensors that layers keep from one call to the next. Each kind of state is a class that answers for itself.

A convolution layer keeps a conv state: the last `conv_L_cache` columns of `B * x`. An attention layer keeps a KV
cache, which grows by one column a token. What a state is for in its layer, its role, decides its names. No other module
spells the names out, and none asks for the kind of a state: it asks the state.

The cache inputs of a graph follow each other in layer order, and the cache outputs in the same order. So a caller can
feed each output back to the input at the same position.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from optimum_lfm2.errors import Lfm2Error


BATCH = "batch_size"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = "past_sequence_length + sequence_length"

LOGITS_TO_KEEP = "num_logits_to_keep"

GROWS = None  # stands in place of a size, for the axis that grows with the sequence
# The naming conventions in use: exports on the Hub and Transformers.js; the builder of onnxruntime-genai.
CACHE_NAMES = ("hub", "genai")


@dataclass(frozen=True)
class State:
    """A tensor that a layer keeps. Each kind is a subclass.

    Attributes:
        axes: the size of each axis after the batch axis. `GROWS` marks the axis that grows with the sequence, and, in a
            graph of another exporter, a size that the graph leaves open.
        grows: whether axis 2 grows with the sequence.
        token_axis: the axis that counts tokens, batch axis included; None where no axis does.
        gives_columns: whether a graph can give what each token adds, so that tokens can be taken back by it.
        dtype: its dtype in every file; None for that of the file's activations.
    """

    axes: tuple[int | None, ...]

    grows: ClassVar[bool] = False
    token_axis: ClassVar[int | None] = 2
    gives_columns: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype | None] = None

    def shape(self, length: int | str) -> tuple[int | str, ...]:
        """Return the whole shape, batch axis included; `length` is the size or symbol of the axis that grows."""
        return (BATCH, *(length if size is GROWS else size for size in self.axes))

    def columns_shape(self, new: int | str) -> tuple[int | str, ...]:
        """Return the shape of the columns that so many new tokens add, batch axis included."""
        width, _, *rest = self.shape(new)[1:]
        return (BATCH, width, new, *rest)

    def fits(self, declared: tuple[int | None, ...]) -> bool:
        """Return whether a graph that declares these axes keeps this state."""
        return declared == self.axes

    def take(self, x: torch.Tensor, row: int, seen: torch.Tensor) -> torch.Tensor:
        """Take one row's state out of a graph's tensor, in the form of transformers' cache.

        Args:
            x: the graph's tensor, (batch_size, *axes).
            row: the index of the row.
            seen: the past columns that the row sees, int64.

        Returns:
            A tensor of one row, (1, ...).
        """
        return x[row : row + 1]

    def fill(self, own: torch.Tensor, target: torch.Tensor, row: int, columns: torch.Tensor) -> None:
        """Write one row's state over a graph's tensor. What holds no unmasked token stays as it is.

        Args:
            own: the row's state in transformers' cache, (1, ...).
            target: the graph's tensor, (batch_size, *axes).
            row: the index of the row.
            columns: the columns of the row's new tokens, int64.
        """
        target[row] = own[0]

    def after(self, before: torch.Tensor, columns: torch.Tensor, count: int) -> torch.Tensor:
        """Return the state after the first `count` tokens of a call.

        Args:
            before: the state before the call, (batch_size, *axes).
            columns: what the call added, of the shape `columns_shape`.
            count: how many of its tokens stay.
        """
        return torch.cat([before, columns[:, :, :count]], dim=2)[:, :, -before.shape[2] :]


class ConvState(State):
    """The last columns of a convolution's input, (channels, width)."""

    def fits(self, declared: tuple[int | None, ...]) -> bool:
        """As `State.fits`. onnxruntime-genai's builder keeps one column less."""
        channels, width = self.axes
        return declared in (self.axes, (channels, width - 1))  # type: ignore[operator]


class GrowingColumns(State):
    """Keys or values of all columns, (kv_heads, length, head_dim)."""

    grows = True
    gives_columns = False  # the columns themselves are kept

    def take(self, x: torch.Tensor, row: int, seen: torch.Tensor) -> torch.Tensor:
        return x[row : row + 1, :, seen]

    def fill(self, own: torch.Tensor, target: torch.Tensor, row: int, columns: torch.Tensor) -> None:
        target[row][:, columns] = own[0][:, -len(columns) :].to(target.dtype)


class Window(State):
    """Keys or values of a row's last unmasked tokens, (kv_heads, window, head_dim), the newest one last.

    transformers' cache has a column for each token that the row has seen (`reference_cache.hybrid_cache`).
    """

    def take(self, x: torch.Tensor, row: int, seen: torch.Tensor) -> torch.Tensor:
        """As `State.take`. Columns before the window are zeros, which transformers' mask hides."""
        missing = len(seen) - x.shape[2]
        return F.pad(x[row : row + 1, :, max(0, -missing) :], (0, 0, max(0, missing), 0))

    def fill(self, own: torch.Tensor, target: torch.Tensor, row: int, columns: torch.Tensor) -> None:
        kept = own[0][:, -target.shape[2] :]
        target[row][:, target.shape[2] - kept.shape[1] :] = kept.to(target.dtype)


class Recurrent(State):
    """The state of a recurrence, (heads, key_dim, value_dim). Each token changes all of it, and none can be taken out.

    It is float32 in every file. In half precision, small updates of a state that decays slowly would be lost.
    """

    token_axis = None
    gives_columns = False
    dtype = torch.float32


class SsmState(Recurrent):
    """The state of Mamba-2. transformers and other exporters have it as (heads, value_dim, key_dim).

    onnxruntime's operator has the axes of `Recurrent`, and every client reads them from the graph. So the graph does
    not transpose the state. docs/hybrids.md has what that took in a prototype.
    """

    def fits(self, declared: tuple[int | None, ...]) -> bool:
        heads, keys, values = self.axes
        return declared in (self.axes, (heads, values, keys))

    def take(self, x: torch.Tensor, row: int, seen: torch.Tensor) -> torch.Tensor:
        return super().take(x, row, seen).transpose(2, 3)

    def fill(self, own: torch.Tensor, target: torch.Tensor, row: int, columns: torch.Tensor) -> None:
        super().fill(own.transpose(2, 3), target, row, columns)


def keys_or_values(axes: tuple[int | None, ...]) -> State:
    """Return the state of keys or values with these axes, as a graph declares them."""
    return GrowingColumns(axes) if axes[1] is GROWS else Window(axes)


@dataclass(frozen=True)
class Role:
    """What a state is for in its layer. A layer has one state of each role at most.

    Attributes:
        name: in messages, and in onnxruntime-genai's configuration (`past_{name}_names`).
        names: for each convention the names of the input and of the output, with `{}` for the layer.
        made: makes the state of the axes that a graph declares.
        read: further names that graphs of others have.
    """

    name: str
    names: Mapping[str, tuple[str, str]] = field(compare=False)
    made: Any = field(compare=False)
    read: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __lt__(self, other: Role) -> bool:
        return self.name < other.name

    def conventions(self, layer: int, past: str) -> list[str]:
        """Return the conventions in which the layer's input has this name."""
        return [name for name, (spelled, _) in self.names.items() if spelled.format(layer) == past]

    def layer_of(self, name: str, time: int) -> int | None:
        """Return the layer whose input (`time` 0) or output (1) has a name; None if it is no name of this role."""
        for spelled in (*self.names.values(), *self.read):
            before, after = map(re.escape, spelled[time].split("{}"))
            if match := re.fullmatch(rf"{before}(\d+){after}", name):
                return int(match[1])
        return None


def _kv_role(name: str) -> Role:
    names = dict.fromkeys(CACHE_NAMES, (f"past_key_values.{{}}.{name}", f"present.{{}}.{name}"))
    return Role(name, names, keys_or_values, ((f"past.{{}}.{name}", f"present_key_values.{{}}.{name}"),))


CONV = Role(
    "conv",
    {"hub": ("past_conv.{}", "present_conv.{}"), "genai": ("past.{}.conv", "present.{}.conv")},
    ConvState,
)
KEY, VALUE = _kv_role("key"), _kv_role("value")
# The Hub's names of a recurrent state depend on the model. For onnxruntime-genai both are one role.
_RECURRENT_OF_GENAI = ("past.{}.recurrent", "present.{}.recurrent")
SSM = Role("recurrent", {"hub": ("past_ssm.{}", "present_ssm.{}"), "genai": _RECURRENT_OF_GENAI}, SsmState)
RECURRENT = Role(
    "recurrent", {"hub": ("past_recurrent.{}", "present_recurrent.{}"), "genai": _RECURRENT_OF_GENAI}, Recurrent
)


def _part_role(part: str) -> Role:
    names = {"hub": (f"past_conv.{{}}.{part}", f"present_conv.{{}}.{part}")}  # onnxruntime-genai has one a layer
    return Role(f"conv_{part}", names, ConvState)


CONV_QUERY, CONV_KEY, CONV_VALUE = map(_part_role, ("query", "key", "value"))
ROLES = (CONV, CONV_QUERY, CONV_KEY, CONV_VALUE, SSM, RECURRENT, KEY, VALUE)


@dataclass(frozen=True)
class Kept:
    """A state of a layer, with its role."""

    role: Role
    state: State


@dataclass(frozen=True)
class CacheTensor:
    """A cache tensor of a graph.

    Attributes:
        layer: the index of the layer that keeps it.
        role: what it is for in the layer.
        past, present: its names among the graph's inputs and outputs.
        state: how it behaves.
    """

    layer: int
    role: Role
    past: str
    present: str
    state: State

    @property
    def axes(self) -> tuple[int | None, ...]:
        """The size of each axis after the batch axis."""
        return self.state.axes

    @property
    def grows(self) -> bool:
        """Whether axis 2 grows with the sequence."""
        return self.state.grows

    @property
    def columns(self) -> str:
        """The name of the output for the columns that a call adds to a state. Only some graphs have it."""
        return self.present.replace("present", "columns", 1)

    def shape(self, length: int | str) -> tuple[int | str, ...]:
        """As `State.shape`."""
        return self.state.shape(length)


def read_cache_tensors(inputs: Mapping[str, Sequence[Any]], outputs: Iterable[str]) -> list[CacheTensor]:
    """Find the cache tensors that a graph declares, under any naming convention.

    Args:
        inputs: the shape of each graph input, by name. An axis that is not an int is symbolic.
        outputs: the names of the graph outputs.

    Returns:
        The cache tensors in the order of the inputs.

    Raises:
        Lfm2Error: a cache input has no matching output, or a cache output has no matching input.
    """
    past, present = _recognised(inputs, 0), _recognised(outputs, 1)
    if past and (unmatched := past.keys() ^ present.keys()):
        layer, role = min(unmatched)
        side = "input" if (layer, role) in present else "output"
        raise Lfm2Error(f"The graph has no {side} for the {role.name} cache of layer {layer}. Export the model again.")
    return [
        CacheTensor(layer, role, name, present[layer, role], role.made(_sizes(inputs[name])))
        for (layer, role), name in past.items()
    ]


def _recognised(names: Iterable[str], time: int) -> dict[tuple[int, Role], str]:
    found = ((role.layer_of(name, time), role, name) for name in names for role in ROLES)
    return {(layer, role): name for layer, role, name in found if layer is not None}


def _sizes(shape: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in shape[1:])


def cache_tensors(layers: Sequence[Sequence[Kept]], names: str = "hub") -> list[CacheTensor]:
    """List the cache tensors of a model.

    Args:
        layers: for each layer, the states that it keeps.
        names: the naming convention, one of `CACHE_NAMES`.

    Returns:
        The cache tensors in the order of the graph's inputs. The outputs have the same order, after `logits`.
    """
    tensors = []
    for layer, states in enumerate(layers):
        for kept in states:
            past, present = (name.format(layer) for name in kept.role.names[names])
            tensors.append(CacheTensor(layer, kept.role, past, present, kept.state))
    return tensors


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def flatten(layers: Iterable[Sequence[Any]]) -> list[Any]:
    """Flatten `[(conv,), (key, value), ...]`, one tuple a layer, to a list in the order of `cache_tensors`."""
    return [tensor for layer in layers for tensor in layer]


def unflatten(values: Sequence[Any], tensors: Sequence[CacheTensor]) -> list[tuple[Any, ...]]:
    """Undo `flatten`: group `values`, one for each of `tensors`, into one tuple a layer."""
    pairs = zip(tensors, values, strict=True)
    return [tuple(value for _, value in layer) for _, layer in groupby(pairs, key=lambda pair: pair[0].layer)]
