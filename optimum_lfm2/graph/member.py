"""The type of the record that describes a family member. `optimum_lfm2/families/` has one record a member.

The exporter, the runtime and the tools ask the record about a member. Nothing else compares model types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx_ir as ir
import torch
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from optimum_lfm2.caches import CONV, CacheTensor, Kept, Window, cache_tensors
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.fields import Field
from optimum_lfm2.graph.call import Call, Rotary
from optimum_lfm2.weights.blocks import Scheme
from optimum_lfm2.weights.checkpoint import Checkpoint
from optimum_lfm2.weights.gguf import GgufFields


# Gives a parameter by its name in the checkpoint, or several joined along their first axis. With `kernel=True`, a
# depthwise kernel stored as (width, 1, taps) or (width, 1, rows, columns) comes as (taps, width).
Weight = Callable[..., torch.Tensor]

# Takes hidden states (batch_size, sequence_length, hidden_size), the weights and the name of the layer's feed-forward
# in the checkpoint. Returns hidden states of the same shape.
FeedForward = Callable[[torch.Tensor, Weight, str], torch.Tensor]

# Makes a model of transformers from its configuration. It takes the configuration and, by name, the dtype.
ModelMaker = Callable[..., PreTrainedModel]

# Changes the traced graph. It gets the graph, the weights by name, and how they are quantised (None: not at all).
GraphPass = Callable[[ir.Graph, Mapping[str, Any], Scheme | None], None]


# What a block gives: its output, (batch_size, sequence_length, hidden_size); the present caches of the layer; and the
# columns that the call adds to each state of the layer, (batch_size, ..., sequence_length, ...). A state is a cache of
# fixed size.
Mixed = tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]


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
    ) -> Mixed:
        """Return the block's output, the layer's present caches, and the columns that its states gain.

        Args:
            hidden: hidden states after the norm, float (batch_size, sequence_length, hidden_size).
            past: the layer's caches in the order of `LayerKind.caches`, or None for a graph without cache inputs.
            shared: the result of `LayerKind.prepare`.
            weight: gives a parameter by its name.
            name: the name of the layer's mixer in the checkpoint, such as `model.layers.0.conv`.
        """


ENCODER_CLASSES = "ORTModelForFeatureExtraction, ORTModelForMaskedLM or the class of its head"
TRANSFORMERS_MODELS: Mapping[str, ModelMaker] = {
    "text-generation": AutoModelForCausalLM.from_config,
    "feature-extraction": AutoModel.from_config,
}


def published(*names: str) -> Callable[[str], bool]:
    """Return a function that tells whether `auto_map` names one of these classes, which transformers has too.

    Fine-tunes name the repository before it: `LiquidAI/LFM2-VL-1.6B--modeling_lfm2_vl.Lfm2VlModel`.
    """
    return lambda name: name.rpartition("--")[2] in names


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer. `layer_types` in config.json names the kind of each layer.

    Attributes:
        mixer: the block that mixes tokens, as graph code.
        module: the name of this block in transformers' layer.
        caches: takes a configuration and returns the states that a layer of this kind keeps.
        prepare: computes what all layers of the kind share in a call. It gets the call, the configuration and the
            kind's rotary table (None for a kind that rotates nothing).
        instead: takes a configuration and returns the kind that replaces this one under it; None for none.
    """

    mixer: Mixer
    module: str
    caches: Callable[[PretrainedConfig], Sequence[Kept]]
    prepare: Callable[[Call, PretrainedConfig, Rotary | None], Any]
    instead: Callable[[PretrainedConfig], LayerKind | None] = lambda config: None


@dataclass(frozen=True)
class LayerNorms:
    """The names of a layer's norms in the checkpoint. None stands for a norm that the layer does not have.

    Attributes:
        mixer: the norm before the mixer.
        feed_forward: the norm before the feed-forward.
        after_mixer, after_feed_forward: norms after these blocks, before the residual is added.
    """

    mixer: str | None
    feed_forward: str | None
    after_mixer: str | None = None
    after_feed_forward: str | None = None


@dataclass(frozen=True)
class Factors:
    """What a model multiplies by.

    Attributes:
        embedding: the embedding.
        residual: the output of each block, before the residual is added.
        logits: the logits.
    """

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0


LFM2_NORMS = LayerNorms("operator_norm", "ffn_norm")


@dataclass(frozen=True)
class Head:
    """What follows the final norm of an encoder.

    Attributes:
        output: the name of the graph's output.
        axes: takes a configuration and returns the axes of the output after the batch axis.
        forward: takes final hidden states (batch_size, sequence_length, hidden_size), the call, the weights and the
            configuration; returns the output.
    """

    output: str
    axes: Callable[[PretrainedConfig], tuple[int | str, ...]]
    forward: Callable[[torch.Tensor, Call, Weight, PretrainedConfig], torch.Tensor]


@dataclass(frozen=True)
class Member:
    """The record of a member of the family.

    Attributes:
        model_type: as in config.json.
        architectures: the classes whose checkpoints are exported, each with its task: `text-generation` with a
            language model's head, `feature-extraction` without a head.
        min_transformers: the first release of transformers that has the model.
        layer_kinds: the kinds of layers, by their names in `layer_types`.
        feed_forwards: takes a configuration and returns the feed-forward of each layer.
        rotary: reads the rotary tables from transformers' model, by the kind of layer that uses them.
        fields: the fields of config.json that the member adds, or whose values differ from other members'. Each says
            what it may hold.
        check: raises `Lfm2Error` for a config.json, as a mapping, for which the member's graph is wrong.
        norms: takes a configuration and a layer's name in `layer_types`, and returns the names of the layer's norms.
        final_norm: the name of the norm after the last layer.
        epsilon: takes a configuration and returns what norms add to the mean square.
        feed_forward: the name of the feed-forward's module in transformers' layer.
        factors: takes a configuration and returns what the model multiplies by.
        kernel: takes a configuration and returns the number of columns that convolutions see.
        checkpoint: the class that reads the stored weights.
        in_8_bits: endings of the names of linear layers that have 8 bits in every quantised file (`Scheme.in_8_bits`).
        check_scheme: raises `Lfm2Error` for a quantisation that the member's operators cannot compute.
        passes: passes over the traced graph that this member needs, besides those for all members.
        tolerance: takes a scheme and returns the relative error that validation accepts. 0 leaves the common tolerance.
        spelled: takes the name of a class and returns how `architectures` spells it. None if it is no class of this
            member. Among members of one model type, it decides which one a checkpoint belongs to.
        models: for each task, what makes the model of transformers that is the reference.
        heads: the heads of an encoder by their tasks. A decoder has none: its head is a part of the decoder.
        export_type: what Optimum's `TasksManager` calls the member, where that is not its model type.
        own_code: takes what `auto_map` in config.json names, such as `modeling_lfm2_vl.Lfm2VlModel`. Returns
            whether `models` has the same model, so that nobody has to run the checkpoint's own code.
        mend: corrects, in place, what transformers reads of a configuration otherwise than its checkpoint was trained.
            Returns a sentence on each correction.
        title: what messages call the model.
        page: the page of docs/ that is about the model. None for that of its model type.
        min_onnxruntime: the first release of onnxruntime that has the member's operators. None for those of any release
            that this package takes.
        genai_type: the model type in `genai_config.json`. None if onnxruntime-genai cannot run the member.
        growing: the record for a graph whose sliding layers keep the keys and values of all columns. Some runtimes have
            no other cache. None for a member whose attention keeps all columns anyway.
        packed: the record for a graph with one conv state a layer, where the Hub's has several. onnxruntime-genai takes
            one. None for a member that has one anyway.
        written: changes the contents of a folder's config.json to what other runtimes and releases read.
        yields: whether Optimum's own configuration for the model type goes before ours, should it have one.
        text: the field of config.json that has the configuration of the decoder, which is another member. None if the
            decoder is all there is.
        text_type: the model type of the decoder where this field names none.
        loader: the class of this package that loads exports of a model in parts.
        tower: the vision tower, a `graph.tower.Tower`. None for a model of text alone.
        gguf: for each `general.architecture` of a GGUF file that holds such a model, what makes its config.json of what
            the file says.
        other_spellings: other spellings of the model type, which some releases of transformers write.
    """

    model_type: str
    architectures: Mapping[str, str]
    min_transformers: str
    layer_kinds: Mapping[str, LayerKind]
    feed_forwards: Callable[[PretrainedConfig], Sequence[FeedForward]]
    rotary: Callable[[PreTrainedModel], Mapping[str, Rotary]]
    fields: Mapping[str, Field] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = lambda config: None
    norms: Callable[[PretrainedConfig, str], LayerNorms] = lambda config, layer_type: LFM2_NORMS
    final_norm: str = "embedding_norm"
    epsilon: Callable[[PretrainedConfig], float] = lambda config: config.norm_eps
    feed_forward: str = "feed_forward"
    factors: Callable[[PretrainedConfig], Factors] = lambda config: Factors()
    kernel: Callable[[PretrainedConfig], int] = lambda config: config.conv_L_cache
    checkpoint: type[Checkpoint] = Checkpoint
    in_8_bits: tuple[str, ...] = ()
    check_scheme: Callable[[Scheme, PretrainedConfig], None] = lambda scheme, config: None
    passes: Sequence[GraphPass] = ()
    tolerance: Callable[[Scheme], float] = lambda scheme: 0.0
    spelled: Callable[[str], str | None] = lambda name: None
    models: Mapping[str, ModelMaker] = field(default_factory=lambda: TRANSFORMERS_MODELS)
    heads: Mapping[str, Head] = field(default_factory=dict)
    export_type: str | None = None
    own_code: Callable[[str], bool] = lambda name: False
    mend: Callable[[PretrainedConfig], list[str]] = lambda config: []
    title: str = "LFM2"
    page: str | None = None
    min_onnxruntime: str | None = None
    genai_type: str | None = None
    growing: Member | None = None
    packed: Member | None = None
    written: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    yields: bool = False
    text: str | None = None
    text_type: str = "lfm2"
    loader: str = "ORTLfm2ForCausalLM"
    tower: Any = None
    gguf: Mapping[str, Callable[[GgufFields], dict[str, Any]]] = field(default_factory=dict)
    other_spellings: tuple[str, ...] = ()

    @property
    def model_types(self) -> tuple[str, ...]:
        """The model type in all its spellings."""
        return (self.model_type, *self.other_spellings)

    def with_caches(self, caches: Iterable[CacheTensor]) -> Member:
        """Return the record for a graph with these cache tensors.

        It is `growing` if they have no windows, and `packed` if a layer has one conv state.
        """
        caches = list(caches)
        if self.packed and any(tensor.role == CONV for tensor in caches):
            return self.packed
        windows = any(isinstance(tensor.state, Window) for tensor in caches)
        return self if self.growing is None or windows else self.growing

    @property
    def encodes(self) -> bool:
        """Whether the member is an encoder. It then has no caches, and its layers see all unmasked tokens of a row."""
        return bool(self.heads)

    @property
    def in_parts(self) -> bool:
        """Whether an export has a file for each of several parts: the decoder is one, and is entered by embeddings."""
        return self.text is not None

    @property
    def decodes(self) -> bool:
        """Whether the member is a decoder of text and nothing else."""
        return not self.encodes and not self.in_parts

    @property
    def options(self) -> tuple[str, ...] | None:
        """The options of `--model-kwargs` that have an effect; None means all. An encoder has no caches."""
        return ("embedding",) if self.encodes else None

    @property
    def runs_own_code(self) -> bool:
        """Whether validation also runs a checkpoint's own code where the user trusts it."""
        return self.encodes

    def check_loader(self, name: str, where: object) -> None:
        """Raise `Lfm2Error` where a class cannot load exports of this member.

        Args:
            name: the class, such as `ORTLfm2ForCausalLM`.
            where: the folder or id, for the message.
        """
        if self.encodes:
            is_, loaders = "is an encoder, which generates nothing", ENCODER_CLASSES
        elif self.in_parts:
            is_, loaders = "takes pictures too", f"optimum_lfm2.{self.loader}"
        else:
            is_, loaders = "is a model of text alone", f"optimum_lfm2.{self.loader}"
        if name not in loaders:
            raise Lfm2Error(f"{where} {is_}. Load it with {loaders}.")

    def check_task(self, task: str, architectures: Sequence[str] | None) -> None:
        """Refuse a task that a checkpoint has no head for.

        Args:
            task: a task of Optimum, such as `text-generation-with-past`.
            architectures: as in the checkpoint's config.json.

        Raises:
            Lfm2Error: the message lists the tasks that there are.
        """
        if self.encodes:
            known, what = [self.task(architectures), "feature-extraction"], (architectures or [self.model_type])[0]
        else:  # a decoder's head is tied to its embedding, or its tensors are missed
            known, what = self.tasks, self.title
        if task not in known:
            raise Lfm2Error(f"--task {task}: {what} is exported for {', '.join(dict.fromkeys(known))}.")

    @property
    def tasks(self) -> list[str]:
        """The tasks under which Optimum exports the member. Each task of a decoder also has a form with past."""
        if self.encodes:
            return list(self.heads)
        if self.in_parts:
            return list(self.models)
        return [form for task in self.models for form in (task, f"{task}-with-past")]

    def task(self, architectures: Sequence[str] | None) -> str:
        """Return the task of a checkpoint by the `architectures` of its config.json. The first known class decides."""
        known = (self.architectures.get(self.spelled(name) or name) for name in architectures or ())
        return next(filter(None, known), next(iter(self.architectures.values())))

    def kind(self, config: PretrainedConfig, layer_type: str) -> LayerKind:
        """Return the kind of a layer by its name in `layer_types`."""
        kind = self.layer_kinds[layer_type]
        return kind.instead(config) or kind

    def kinds(self, config: PretrainedConfig) -> list[LayerKind]:
        """Return the kind of each layer."""
        return [self.kind(config, layer_type) for layer_type in config.layer_types[: config.num_hidden_layers]]

    def cuts(self, config: PretrainedConfig) -> list[tuple[str, tuple[int, ...]]]:
        """Return the names of the norms that all values go through, in order: those before blocks, and the last one.

        With each come the layers whose mixers lie between the norm before it and it.
        """
        cuts: list[tuple[str, tuple[int, ...]]] = []
        waiting: list[int] = []
        for layer, layer_type in enumerate(config.layer_types[: config.num_hidden_layers]):
            norms = self.norms(config, layer_type)
            if norms.mixer:
                cuts.append((f"layers.{layer}.{norms.mixer}", tuple(waiting)))
                waiting = []
            waiting.append(layer)
            if norms.feed_forward:
                cuts.append((f"layers.{layer}.{norms.feed_forward}", tuple(waiting)))
                waiting = []
        return [*cuts, (self.final_norm, tuple(waiting))]

    def cache_tensors(self, config: PretrainedConfig, names: str = "hub") -> list[CacheTensor]:
        """Return the cache tensors of a model, in the order of the graph's inputs.

        Args:
            config: the model's configuration.
            names: the naming convention, one of `optimum_lfm2.caches.CACHE_NAMES`.
        """
        return cache_tensors([kind.caches(config) for kind in self.kinds(config)], names)
