"""The record that describes a member of the family: one instance a member, in `optimum_lfm2/families/`.

Whatever the exporter, the runtime and the tools have to know of a member they ask here. Nobody else compares a model
type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx_ir as ir
import torch
from transformers import PretrainedConfig, PreTrainedModel

from optimum_lfm2.caches import CacheTensor, Kept, cache_tensors
from optimum_lfm2.fields import Field
from optimum_lfm2.graph.call import Call, Rotary
from optimum_lfm2.weights.blocks import Scheme
from optimum_lfm2.weights.checkpoint import Checkpoint


# A parameter by its name in the checkpoint; `kernel=True` gives a depthwise kernel (width, 1, taps) as (taps, width).
Weight = Callable[..., torch.Tensor]

# Hidden states (tokens, hidden_size), the weights, the name of the layer's feed-forward → (tokens, hidden_size).
FeedForward = Callable[[torch.Tensor, Weight, str], torch.Tensor]

# A pass over the traced graph, which may read the weights and the scheme by which they are quantised.
GraphPass = Callable[[ir.Graph, Mapping[str, Any], Scheme | None], None]


class Mixer(Protocol):
    """What mixes the tokens of a layer."""

    def __call__(
        self,
        hidden: torch.Tensor,
        past: tuple[torch.Tensor, ...] | None,
        shared: Any,
        weight: Weight,
        name: str,
        config: PretrainedConfig,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the block's output and the layer's present caches.

        Args:
            hidden: normed hidden states, (tokens, hidden_size).
            past: the layer's caches in the order of `LayerKind.caches`, or None for a graph without cache inputs.
            shared: what `LayerKind.prepare` gave.
            weight: gives a parameter by its name.
            name: the name of the layer's mixer in the checkpoint, such as `model.layers.0.conv`.
        """


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer, which `layer_types` in config.json names.

    Attributes:
        mixer: the block as graph code.
        module: the block's module in transformers' layer.
        caches: the tensors that a layer of this kind keeps, for a configuration.
        prepare: computes once a call what all layers of the kind share. It gets the call, the configuration and the
            rotary table of the kind (None for a kind that rotates nothing).
        take: a row's cache as transformers has it, (1, ...), of a cache tensor of the graph. It gets the tensor, the
            row, and the past columns that the row sees.
        fill: writes what transformers has of a row over a cache tensor of the graph. It gets transformers' tensor, the
            graph's, the row, and the columns of its new tokens. What belongs to no unmasked token it leaves.
        instead: the kind that takes its place under a configuration; None for none.
    """

    mixer: Mixer
    module: str
    caches: Callable[[PretrainedConfig], Sequence[Kept]]
    prepare: Callable[[Call, PretrainedConfig, Rotary | None], Any]
    take: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]
    fill: Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor], None]
    instead: Callable[[PretrainedConfig], LayerKind | None] = lambda config: None


@dataclass(frozen=True)
class Member:
    """A member of the family.

    Attributes:
        model_type: as in config.json.
        architectures: the classes of transformers whose checkpoints are exported, each with the task that it is for:
            `text-generation` with a head, `feature-extraction` without.
        min_transformers: the first release of transformers that has the model.
        layer_kinds: by their names in `layer_types`.
        feed_forwards: the feed-forward of each layer.
        rotary: the rotary table of each kind of layer that has one, read from transformers' model.
        fields: the fields of config.json that other members lack or fill otherwise, each with what it may hold.
        check: raises `Lfm2Error` for a config.json, as a mapping, that the member's graph is not right for.
        post_norms: the norms of a layer that follow its mixer and its feed-forward, before the residual is added;
            None where a layer has none.
        checkpoint: reads the stored weights.
        check_scheme: raises `Lfm2Error` for a quantisation that the member's operators cannot do.
        passes: what finishes the traced graph, besides what all members need.
        tolerance: the difference from transformers that validation accepts for a scheme, where it is larger than that
            of other members; 0 for theirs.
        genai_type: what `genai_config.json` calls the model; None where onnxruntime-genai (0.18) has nothing to run it.
        transformers_js: whether Transformers.js (4.3.1) has the model.
    """

    model_type: str
    architectures: Mapping[str, str]
    min_transformers: str
    layer_kinds: Mapping[str, LayerKind]
    feed_forwards: Callable[[PretrainedConfig], Sequence[FeedForward]]
    rotary: Callable[[PreTrainedModel], Mapping[str, Rotary]]
    fields: Mapping[str, Field] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = lambda config: None
    post_norms: Callable[[PretrainedConfig], tuple[str, str] | None] = lambda config: None
    checkpoint: type[Checkpoint] = Checkpoint
    check_scheme: Callable[[Scheme, PretrainedConfig], None] = lambda scheme, config: None
    passes: Sequence[GraphPass] = ()
    tolerance: Callable[[Scheme], float] = lambda scheme: 0.0
    genai_type: str | None = None
    transformers_js: bool = True

    def kind(self, config: PretrainedConfig, layer_type: str) -> LayerKind:
        """The kind of layer that `layer_types` means by a name."""
        kind = self.layer_kinds[layer_type]
        return kind.instead(config) or kind

    def kinds(self, config: PretrainedConfig) -> list[LayerKind]:
        """The kind of each layer."""
        return [self.kind(config, layer_type) for layer_type in config.layer_types[: config.num_hidden_layers]]

    def cache_tensors(self, config: PretrainedConfig, names: str = "hub") -> list[CacheTensor]:
        """The cache tensors of a model, in the order of the graph's inputs.

        Args:
            names: the convention of their names, a key of `optimum_lfm2.caches.CACHE_NAMES`.
        """
        return cache_tensors([kind.caches(config) for kind in self.kinds(config)], names)
