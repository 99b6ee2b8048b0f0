"""The type of the record that describes a family member. `optimum_lfm2/families/` has one record a member.

The exporter, the runtime and the tools ask the record about a member. Nothing else compares model types.
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


# Gives a parameter by its name in the checkpoint. With `kernel=True`, a depthwise kernel stored as (width, 1, taps)
# comes as (taps, width).
Weight = Callable[..., torch.Tensor]

# Takes hidden states (tokens, hidden_size), the weights and the name of the layer's feed-forward in the checkpoint.
# Returns hidden states (tokens, hidden_size).
FeedForward = Callable[[torch.Tensor, Weight, str], torch.Tensor]

# Changes the traced graph. It gets the graph, the weights by name, and how they are quantised (None: not at all).
GraphPass = Callable[[ir.Graph, Mapping[str, Any], Scheme | None], None]


class Mixer(Protocol):
    """The block of a layer that mixes tokens: a short convolution or attention."""

    def __call__(
        self,
        hidden: torch.Tensor,
        past: tuple[torch.Tensor, ...] | None,
        shared: Any,
        weight: Weight,
        name: str,
        config: PretrainedConfig,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the block's output, (tokens, hidden_size), and the layer's present caches.

        Args:
            hidden: hidden states after the norm, float (tokens, hidden_size).
            past: the layer's caches in the order of `LayerKind.caches`, or None for a graph without cache inputs.
            shared: the result of `LayerKind.prepare`.
            weight: gives a parameter by its name.
            name: the name of the layer's mixer in the checkpoint, such as `model.layers.0.conv`.
        """


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer. `layer_types` in config.json names the kind of each layer.

    Attributes:
        mixer: the block that mixes tokens, as graph code.
        module: the name of this block in transformers' layer.
        caches: takes a configuration and returns the tensors that a layer of this kind keeps.
        prepare: computes what all layers of the kind share in a call. It gets the call, the configuration and the
            kind's rotary table (None for a kind that rotates nothing).
        take: takes one row's cache, in the form of transformers' cache (1, ...), out of a cache tensor of the graph. It
            gets the tensor, the row's index and the past columns that the row sees.
        fill: writes one row's cache over a cache tensor of the graph. It gets transformers' tensor, the graph's, the
            row's index and the columns of the row's new tokens. It leaves what belongs to no unmasked token.
        instead: takes a configuration and returns the kind that replaces this one under it; None for none.
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
    """The record of a member of the family.

    Attributes:
        model_type: as in config.json.
        architectures: the classes of transformers whose checkpoints are exported. Each has its task:
            `text-generation` with a head, `feature-extraction` without.
        min_transformers: the first release of transformers that has the model.
        layer_kinds: the kinds of layers, by their names in `layer_types`.
        feed_forwards: takes a configuration and returns the feed-forward of each layer.
        rotary: reads the rotary tables from transformers' model, by the kind of layer that uses them.
        fields: the fields of config.json that other members lack or fill otherwise, each with what it may hold.
        check: raises `Lfm2Error` for a config.json, as a mapping, for which the member's graph is wrong.
        post_norms: takes a configuration and returns the names of two norms of a layer, or None where it has none. The
            first follows the mixer and the second the feed-forward, before the residual is added.
        checkpoint: the class that reads the stored weights.
        check_scheme: raises `Lfm2Error` for a quantisation that the member's operators cannot compute.
        passes: passes over the traced graph that this member needs, besides those for all members.
        tolerance: takes a scheme and returns the relative error that validation accepts. 0 leaves the common tolerance.
        genai_type: the model type in `genai_config.json`. None if onnxruntime-genai cannot run the member.
        transformers_js: whether Transformers.js (4.3.1) has the model.
        text: the field of config.json that has the configuration of the decoder, which is another member. None if the
            decoder is all there is.
        other_spellings: of the model type, in files that other releases of transformers wrote.
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
    text: str | None = None
    other_spellings: tuple[str, ...] = ()

    def kind(self, config: PretrainedConfig, layer_type: str) -> LayerKind:
        """The kind of layer that `layer_types` means by a name."""
        kind = self.layer_kinds[layer_type]
        return kind.instead(config) or kind

    def kinds(self, config: PretrainedConfig) -> list[LayerKind]:
        """The kind of each layer."""
        return [self.kind(config, layer_type) for layer_type in config.layer_types[: config.num_hidden_layers]]

    def cache_tensors(self, config: PretrainedConfig, names: str = "hub") -> list[CacheTensor]:
        """Return the cache tensors of a model, in the order of the graph's inputs.

        Args:
            config: the model's configuration.
            names: the naming convention, a key of `optimum_lfm2.caches.CACHE_NAMES`.
        """
        return cache_tensors([kind.caches(config) for kind in self.kinds(config)], names)
