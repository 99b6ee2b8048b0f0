"""What differs between transformers releases; each entry says at which release it can go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.models.lfm2.modeling_lfm2 import Lfm2HybridConvCache

from optimum_lfm2.caches import CONV


class _HybridCache(Lfm2HybridConvCache):
    """transformers 4's cache, which looks for an attention layer even where a model has none."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        config = model.config
        self.key_cache: list[torch.Tensor] = []
        self.value_cache: list[torch.Tensor] = []
        self.conv_cache: list[torch.Tensor] = []
        self.layer_types = config.layer_types
        self.length = length

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        return self.length


def hybrid_cache(model: PreTrainedModel, caches: Sequence[tuple[torch.Tensor, ...]] | None, length: int):
    """A cache of one row that transformers' own forward takes, filled with `caches` (one tuple a layer) or empty."""
    config = model.config
    cache = _HybridCache(model, length)
    nothing = torch.zeros(0, dtype=model.dtype, device=model.device)
    empty_state = torch.zeros(1, config.hidden_size, config.conv_L_cache, dtype=model.dtype, device=model.device)
    for layer, layer_type in enumerate(config.layer_types):
        key, value, conv = nothing, nothing, empty_state.clone()
        if caches is not None and layer_type == CONV:
            conv = caches[layer][0].clone()
        elif caches is not None:
            key, value = (x.clone() for x in caches[layer])
        cache.key_cache.append(key)
        cache.value_cache.append(value)
        cache.conv_cache.append(conv)
    return cache


def hybrid_cache_layers(cache: _HybridCache, model: PreTrainedModel) -> list[tuple[torch.Tensor, ...]]:
    """The inverse of `hybrid_cache`: one tuple of caches a layer."""
    return [
        (cache.conv_cache[i],) if layer_type == CONV else (cache.key_cache[i], cache.value_cache[i])
        for i, layer_type in enumerate(model.config.layer_types)
    ]
