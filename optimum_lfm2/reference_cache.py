"""The cache of transformers' own forward, which is the reference of validation.

transformers 5 has one class for all models. transformers 4 has one for LFM2 and one for Granite; they go with it. mypy
checks against the release that pip resolves, hence the ignored errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_lfm2.caches import ConvState, Recurrent, State
from optimum_lfm2.compat import CACHE, TRANSFORMERS_5


Caches = Sequence[tuple[torch.Tensor, ...]]


def _parted(kept: Sequence[State], tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Part what a layer keeps into the states of convolutions, recurrent states, and keys and values."""
    parts: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for state, x in zip(kept, tensors, strict=True):
        parts[0 if isinstance(state, ConvState) else 1 if isinstance(state, Recurrent) else 2].append(x)
    return parts


def _conv_states(kept: Sequence[State], conv: torch.Tensor | None) -> list[torch.Tensor]:
    """Cut transformers' conv state of a layer, which has one, into those that the graph keeps."""
    widths = [state.axes[0] for state in kept if isinstance(state, ConvState)]
    return list(conv.split(widths, dim=1)) if widths else []  # type: ignore[union-attr, arg-type]


if TRANSFORMERS_5:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class _HybridCache(DynamicCache):
        """The cache of transformers 5 with a length that is set from outside.

        transformers reads the length from an attention layer, and a model may have none.
        """

        length = 0

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.length

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # type: ignore[override]
            return self.length + query_length, 0

    def hybrid_cache(model: PreTrainedModel, states: Sequence[Sequence[State]], caches: Caches | None) -> Any:
        """Make a cache of one row for transformers' forward in float32.

        Args:
            states: what each layer keeps.
            caches: a tuple a layer of what it keeps for one row, as `State.take` gives it. None makes an empty cache.
        """
        cache: Any = _HybridCache(config=model.config)
        # Sliding layers keep all keys here, and transformers' mask hides those outside the window.
        cache.layers = [DynamicLayer() if getattr(layer, "is_sliding", False) else layer for layer in cache.layers]
        for layer, (kept, tensors) in enumerate(zip(states, caches, strict=True) if caches else ()):
            convs, recurrent, columns = _parted(kept, tensors)
            if convs:
                cache.update_conv_state(torch.cat(convs, dim=1), layer)
            for x in recurrent:
                cache.update_recurrent_state(x.clone(), layer)
            if columns:
                cache.update(*(x.clone() for x in columns), layer)
        return cache

    def hybrid_cache_layers(cache: Any, states: Sequence[Sequence[State]]) -> list[tuple[torch.Tensor, ...]]:
        """Undo `hybrid_cache`: return one tuple of tensors a layer."""
        return [
            (*_conv_states(kept, layer.conv_states[0]), *(x for x in layer.recurrent_states.values() if x is not None))
            if hasattr(layer, "conv_states")
            else (layer.keys, layer.values)
            for kept, layer in zip(states, cache.layers, strict=True)
        ]

else:
    from transformers.models.lfm2.modeling_lfm2 import Lfm2HybridConvCache

    class _ConvCache(Lfm2HybridConvCache):
        """The cache of transformers 4 with a length that is set from outside.

        transformers reads the length from an attention layer, and a model may have none.
        """

        def __init__(self, model: PreTrainedModel) -> None:
            self.key_cache: list[torch.Tensor] = []
            self.value_cache: list[torch.Tensor] = []
            self.conv_cache: list[torch.Tensor] = []
            self.layer_types = model.config.layer_types
            self.length = 0

        def get_seq_length(self, layer_idx: int | None = 0) -> int:
            return self.length

        def keep(self, layer: int, states: list[torch.Tensor], key: Any, value: Any, filled: bool) -> None:
            """Add a layer with what it keeps. A layer of attention has no states."""
            self.key_cache.append(key)
            self.value_cache.append(value)
            self.conv_cache.append(states[0] if states else torch.zeros(0))

        def kept(self, layer: int) -> tuple[torch.Tensor, ...]:
            """Return the states of a layer."""
            return (self.conv_cache[layer],)

    def _mamba_cache(model: PreTrainedModel) -> Any:
        """Make an empty cache of Granite's hybrid, whose length is set from outside too."""
        from transformers.models.granitemoehybrid.modeling_granitemoehybrid import HybridMambaAttentionDynamicCache

        class MambaCache(HybridMambaAttentionDynamicCache):
            length = 0

            def get_seq_length(self, layer_idx: int | None = 0) -> int:
                return self.length

            def keep(self, layer: int, states: list[torch.Tensor], key: Any, value: Any, filled: bool) -> None:
                self.has_previous_state = filled
                if states:
                    self.conv_states[layer], self.ssm_states[layer] = states
                elif filled:
                    self.key_cache[layer], self.value_cache[layer] = key, value

            def kept(self, layer: int) -> tuple[torch.Tensor, ...]:
                return self.conv_states[layer], self.ssm_states[layer]

        return MambaCache(model.config, 1, torch.float32)  # type: ignore[arg-type]

    def _empty(kept: Sequence[State]) -> list[torch.Tensor]:
        """Return what a layer keeps before the first token."""
        nothing = torch.zeros(0, dtype=torch.int64)
        sizes = ((1, *(0 if size is None else size for size in state.axes)) for state in kept)
        return [state.take(torch.zeros(shape), 0, nothing) for state, shape in zip(kept, sizes, strict=True)]

    def hybrid_cache(model: PreTrainedModel, states: Sequence[Sequence[State]], caches: Caches | None) -> Any:
        """Make a cache of one row for transformers' forward in float32.

        Args:
            states: what each layer keeps.
            caches: a tuple a layer of what it keeps for one row, as `State.take` gives it. None makes an empty cache.
        """
        recurrent = any(isinstance(state, Recurrent) for kept in states for state in kept)
        cache: Any = _mamba_cache(model) if recurrent else _ConvCache(model)
        for layer, kept in enumerate(states):
            convs, ssms, columns = _parted(kept, _empty(kept) if caches is None else caches[layer])
            key, value = (x.clone() for x in columns or (torch.zeros(0), torch.zeros(0)))
            cache.keep(layer, [x.clone() for x in (*convs, *ssms)], key, value, caches is not None)
        return cache

    def hybrid_cache_layers(cache: Any, states: Sequence[Sequence[State]]) -> list[tuple[torch.Tensor, ...]]:
        """Undo `hybrid_cache`: return one tuple of tensors a layer."""
        return [
            cache.kept(i) if any(not state.grows for state in kept) else (cache.key_cache[i], cache.value_cache[i])
            for i, kept in enumerate(states)
        ]


def call(
    model: PreTrainedModel, tokens: torch.Tensor, cache: Any, length: int, name: str = "input_ids"
) -> torch.Tensor:
    """Return the first output of transformers' forward for one row: logits or hidden states, (1, new, width).

    Args:
        tokens: the new tokens, int64 (1, new), or what `name` says.
        cache: one of `hybrid_cache`. The call extends it.
        length: the number of tokens that the cache holds.
        name: the argument of the forward that takes them. `inputs_embeds` takes float32 (1, new, hidden_size).
    """
    cache.length = length
    positions = torch.arange(length, length + tokens.shape[1], device=tokens.device)
    where = {"position_ids": positions[None]} if TRANSFORMERS_5 else {"cache_position": positions}
    return model(use_cache=True, **{name: tokens, CACHE: cache}, **where)[0]
