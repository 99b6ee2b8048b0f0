"""The signature that a session declares. The runtime knows nothing else about a graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from onnxruntime import InferenceSession
from optimum.onnxruntime.utils import TypeHelper
from transformers import PretrainedConfig

from optimum_lfm2.caches import LOGITS_TO_KEEP, CacheTensor, read_cache_tensors
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import member_of
from optimum_lfm2.metadata import ANY_PADDING, IN_PLACE


@dataclass(frozen=True)
class GraphLayout:
    """The signature of an LFM2 graph, whoever exported it.

    Attributes:
        caches: the cache tensors in the order of the inputs; empty for a graph without them.
        described: those that the configuration asks for. A pickled cache has them, and a record cannot be pickled.
        shapes: of each cache input by name, without the batch: None for the axis that grows.
        dtypes: of each cache input by name.
        outputs: all outputs, in order; the first is `logits`.
        vocab_size: width of the logits, None if it is not declared.
        any_padding: whether a row is right beside any neighbour; else rows run alone and without padding.
        in_place: whether keys and values may lie in buffers longer than the sequence, shared by past and present.
    """

    caches: tuple[CacheTensor, ...]
    described: tuple[CacheTensor, ...]
    shapes: dict[str, tuple[int | None, ...]]
    dtypes: dict[str, torch.dtype]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    vocab_size: int | None
    any_padding: bool
    in_place: bool

    @property
    def keeps_logits(self) -> bool:
        return LOGITS_TO_KEEP in self.inputs

    @property
    def states(self) -> list[CacheTensor]:
        """The caches of fixed size."""
        return [cache for cache in self.caches if not cache.grows]

    @property
    def gives_columns(self) -> bool:
        """Whether the graph gives the columns that a call adds to each state."""
        return all(cache.columns in self.outputs for cache in self.states)

    @classmethod
    def read(cls, session: InferenceSession, config: PretrainedConfig) -> GraphLayout:
        """Read a session. Raise `Lfm2Error` for an encoder, and for a graph whose caches are not LFM2's."""
        member = member_of(config)
        if member.encodes:
            member.check_loader("ORTLfm2ForCausalLM", f"A model of the class {', '.join(config.architectures or ())}")
        inputs = {value.name: value for value in session.get_inputs()}
        inputs |= {value.name: value for value in session.get_overridable_initializers()}
        outputs = {value.name: value for value in session.get_outputs()}
        if "logits" not in outputs:
            raise Lfm2Error(
                f"The graph has no output logits, only {', '.join(list(outputs)[:3])}: it was not exported for "
                "text-generation. Export it with --task text-generation-with-past."
            )
        caches = read_cache_tensors({name: value.shape for name, value in inputs.items()}, outputs)
        metadata = session.get_modelmeta().custom_metadata_map
        width = outputs["logits"].shape[-1]
        described = member.with_caches(caches).cache_tensors(config)
        return cls(
            caches=tuple(caches),
            described=tuple(described),
            shapes=_fixed(caches, described),
            dtypes={c.past: TypeHelper.ort_type_to_torch_type(inputs[c.past].type) for c in caches},
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            vocab_size=width if isinstance(width, int) else None,
            any_padding=metadata.get(ANY_PADDING) == "true",
            in_place=metadata.get(IN_PLACE) == "true",
        )

    def check(self, config: PretrainedConfig, path: object) -> None:
        """Raise `Lfm2Error` where the graph is not the one that `config` describes."""

        def disagree(what: str, graph: object, expected: object) -> Lfm2Error:
            return Lfm2Error(
                f"{path} has {what} {graph}, but its config.json says {expected}. They belong to different models: "
                "export the checkpoint again."
            )

        if self.vocab_size not in (None, config.vocab_size):
            raise disagree("a vocabulary of", self.vocab_size, config.vocab_size)
        if not self.caches:
            return
        declared = {(c.layer, c.role): c for c in self.caches}
        expected = {(c.layer, c.role): c for c in self.described}
        if missing := expected.keys() - declared.keys():
            raise Lfm2Error(
                f"{path} has no input {expected[min(missing)].past}, which its config.json asks for. "
                "Export the checkpoint again."
            )
        if extra := declared.keys() - expected.keys():
            raise disagree("the cache input", declared[min(extra)].past, "nothing of it")
        for cache in self.caches:
            shape, wanted = self.shapes[cache.past], expected[cache.layer, cache.role].state
            if not wanted.fits(shape):
                raise disagree(f"{cache.past} of shape", shape, wanted.axes)


def _fixed(caches: Sequence[CacheTensor], described: Iterable[CacheTensor]) -> dict[str, tuple[int | None, ...]]:
    """Return the sizes after the batch, by the name of the input.

    `described`, the caches by the configuration, gives those that the graph leaves open, as genai's builder does.
    """
    expected = {(c.layer, c.role): c.axes for c in described}
    known = ((cache, expected.get((cache.layer, cache.role), cache.axes)) for cache in caches)
    return {
        cache.past: tuple(size or default for size, default in zip(cache.axes, axes, strict=True))
        for cache, axes in known
    }
