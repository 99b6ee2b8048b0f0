"""The gold for validation: transformers' own forward, on one row at a time, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from optimum_lfm2 import reference_cache
from optimum_lfm2.caches import flatten, unflatten
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import member_of
from optimum_lfm2.loading.models import materialize_buffers
from optimum_lfm2.validation.export_config import ExportConfig
from optimum_lfm2.validation.pieces import Cut, Values
from optimum_lfm2.validation.streamed import StandIns
from optimum_lfm2.validation.together import run_together


# Where a forward records its values: the values of its call, its row, and the indices of its tokens.
PLACE: ContextVar[tuple[Values, int, torch.Tensor]] = ContextVar("place")


def norm_names(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the names of the norms between a model's blocks, in the order in which they run.

    With each come the layers whose mixers lie between the norm before it and it.
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return {f"{prefix}{name}": layers for name, layers in member_of(model.config).cuts(model.config)}


class Reference:
    """transformers' values at every cut and of every output.

    It computes in float32. The output of a norm is rounded to the file's dtype, so that a router gets the same input as
    in the file.

    Args:
        config: the `OnnxConfig` of the export. It has the weights.
        model: transformers' model. Its own weights are not read.
        cuts: the norms whose inputs and outputs are recorded.
        calls: one dictionary of inputs a call, as `config.generate_dummy_inputs` returns them.

    Attributes:
        values: for each call the values by name, float32. A value of a masked token is NaN.
    """

    def __init__(
        self, config: ExportConfig, model: Any, cuts: Sequence[Cut], calls: Sequence[Mapping[str, Any]]
    ) -> None:
        self._config, self._model, self._cuts = config, model, cuts
        self._calls = calls
        self.values: list[Values] = [self._empty(inputs) for inputs in calls]

    def _empty(self, inputs: Mapping[str, Any]) -> Values:
        batch, sequence = inputs[self._config.TOKENS].shape[:2]
        total = inputs["attention_mask"].shape[1]
        width = self._model.config.hidden_size
        shapes: dict[str, Sequence[int]] = {
            value.name: (batch, sequence, width) for cut in self._cuts for value in cut.values
        }
        output, *_ = self._config.outputs
        axes = self._config.output_shapes()[output]
        shapes[output] = (batch, *(axis if isinstance(axis, int) else sequence for axis in axes[1:]))
        if self._config.use_past:
            caches = self._config.cache_tensors
            shapes |= {tensor.present: (batch, *map(int, tensor.shape(total)[1:])) for tensor in caches}
            shapes |= {
                tensor.columns: (batch, *map(int, tensor.state.columns_shape(sequence)[1:]))
                for tensor in self._config.cache_tensors
                if tensor.columns in self._config.outputs
            }
        return {name: torch.full(tuple(shape), torch.nan) for name, shape in shapes.items()}

    def compute(self) -> list[Values]:
        """Compute and return `values`.

        Raises:
            Lfm2Error: the calls hide every token, or a weight cannot be read.
        """
        materialize_buffers(self._model)
        weights = StandIns(self._model, self._config.weights, self._config.scheme)
        rows = [
            (inputs, values, *row)
            for inputs, values in zip(self._calls, self.values, strict=True)
            for row in visible_rows(inputs["attention_mask"], inputs[self._config.TOKENS].shape[1])
        ]
        if not rows:
            raise Lfm2Error("The inputs of validation hide every token, so nothing can be compared. Change the shapes.")
        with ExitStack() as stack:
            for cut in self._cuts:
                hook = self._model.get_submodule(cut.name).register_forward_hook(self._recorder(cut))
                stack.callback(hook.remove)
            run_together(self._model, weights, [partial(self._run, *row) for row in rows])
        return self.values

    def _recorder(self, cut: Cut) -> Any:
        dtype = self._model.dtype

        def record(module: Any, taken: tuple, given: torch.Tensor) -> torch.Tensor:
            given = given.to(dtype).float()
            values, row, new = PLACE.get()
            values[cut.normed.name][row, new] = given[0]
            values[cut.hidden.name][row, new] = taken[0][0]
            return given

        return record

    def _run(self, inputs: Mapping[str, Any], values: Values, row: int, seen: torch.Tensor, new: torch.Tensor) -> None:
        """Run one row's unmasked tokens over the columns of the cache that it sees."""
        PLACE.set((values, row, new))
        output = next(iter(self._config.outputs))
        name = self._config.TOKENS
        tokens = inputs[name][row, new][None]
        if not self._config.cache_tensors:  # an encoder keeps nothing
            result = self._model(tokens)[0][0].float()
            values[output][(row, new) if result.dim() > 1 else row] = result  # of each token, or of the row
            return
        caches = self._config.cache_tensors
        states = unflatten([tensor.state for tensor in caches], caches)
        cache = reference_cache.hybrid_cache(self._model, states, None)
        if len(seen):
            past = (zip(*layer, strict=True) for layer in zip(states, inputs["past_key_values"], strict=True))
            own = [tuple(state.take(x.float(), row, seen) for state, x in layer) for layer in past]
            cache = reference_cache.hybrid_cache(self._model, states, own)
        values[output][row, new] = reference_cache.call(self._model, tokens, cache, len(seen), name)[0].float()
        if self._config.use_past:
            columns = inputs["attention_mask"].shape[1] - inputs[name].shape[1] + new
            kept = flatten(reference_cache.hybrid_cache_layers(cache, states))
            for tensor, own in zip(caches, kept, strict=True):
                tensor.state.fill(own, values[tensor.present], row, columns)
                if tensor.columns in self._config.outputs:  # transformers keeps the last columns of a conv state alone
                    known = own[0][:, -len(new) :]
                    values[tensor.columns][row][:, new[-known.shape[1] :]] = known.float()


def visible_rows(mask: torch.Tensor, sequence: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield each row that has an unmasked new token: its index, its cached columns, and the indices of its new tokens.

    Args:
        mask: int64 (batch_size, past_sequence_length + sequence).
        sequence: the number of new columns.
    """
    past = mask.shape[1] - sequence
    for row in range(len(mask)):
        visible = mask[row].nonzero()[:, 0]
        seen, new = visible[visible < past], visible[visible >= past] - past
        if len(new):
            yield row, seen, new
