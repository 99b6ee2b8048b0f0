"""The decoder as an ONNX graph. It takes hidden states, and gives hidden states and caches.

The embedding before it and the head after it are its ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from transformers import PretrainedConfig

from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph.call import Call, Rotary, read_call
from optimum_lfm2.graph.member import Member, Weight


Caches = Sequence[tuple[torch.Tensor, ...]]


class Decoder:
    """A member's decoder for one configuration.

    Args:
        member: its record.
        config: the model's configuration.
        rotary: the rotary table of each kind of layer that has one, by the kind's name in `layer_types`.
        prefix: the prefix of the decoder's parameter names: `model.` under a head, else nothing.
    """

    def __init__(self, member: Member, config: PretrainedConfig, rotary: dict[str, Rotary], prefix: str) -> None:
        self._member = member
        self._config = config
        self._rotary = rotary
        self._prefix = prefix
        self._kinds = member.kinds(config)
        self._feed_forwards = member.feed_forwards(config)
        self._norms = [member.norms(config, layer_type) for layer_type in config.layer_types]
        self._epsilon = member.epsilon(config)
        self._factors = member.factors(config)

    def embed(self, input_ids: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Embed ids: int64 (batch_size, sequence_length) → hidden states (batch_size, sequence_length, hidden_size)."""
        embedded = ops.embedding(weight(f"{self._prefix}embed_tokens.weight"), input_ids)
        return scaled(embedded, self._factors.embedding)

    def head(self, hidden: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Compute logits: (batch_size, kept, hidden_size) → (batch_size, kept, vocab_size)."""
        return ops.linear(scaled(hidden, self._factors.logits), weight("lm_head.weight"))

    def enter(self, inputs_embeds: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Take embeddings from outside as hidden states, (batch_size, sequence_length, hidden_size)."""
        return shapes.named(inputs_embeds)

    def layers(
        self, hidden: torch.Tensor, call: Call, past: Caches | None, keep: torch.Tensor | None, weight: Weight
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]], list[tuple[torch.Tensor, ...]]]:
        """Run all layers and the final norm.

        Args:
            hidden: (batch_size, sequence_length, hidden_size).
            call: the call that the tokens belong to.
            past: the caches of `Member.cache_tensors`, one tuple a layer; None for a graph without cache inputs.
            keep: the number of each row's last tokens whose result is wanted, an int64 scalar. 0 and None mean all.
            weight: gives a parameter by its name in the checkpoint.

        Returns:
            Normed hidden states (batch_size, kept, hidden_size), and for each layer a tuple of the present caches, and
            one of the columns that the call adds to its states (see `member.Mixed`).
        """
        config = self._config
        last_layer = config.num_hidden_layers - 1
        shared = self._shared(call)
        present: list[tuple[torch.Tensor, ...]] = []
        columns: list[tuple[torch.Tensor, ...]] = []

        normed = self._normed(hidden, self._name(0, self._norms[0].mixer), weight)
        for i in range(config.num_hidden_layers):
            kind, norms, name = self._kinds[i], self._norms[i], f"layers.{i}"
            out, caches, added = kind.mixer(
                normed,
                None if past is None else past[i],
                shared(config.layer_types[i]),
                weight,
                f"{self._prefix}{name}.{kind.module}",
                config,
            )
            present.append(caches)
            columns.append(added)
            if i == last_layer and keep is not None:
                # Nothing after this point mixes tokens: the rest runs on the tokens whose logits are asked for.
                out, hidden = (shapes.last_tokens(x, keep) for x in (out, hidden))
            out = self._normed(out, self._name(i, norms.after_mixer), weight)
            normed, hidden = self._joined(out, hidden, self._name(i, norms.feed_forward), weight)
            out = self._feed_forwards[i](normed, weight, f"{self._prefix}{name}.{self._member.feed_forward}")
            out = self._normed(out, self._name(i, norms.after_feed_forward), weight)
            following = self._member.final_norm if i == last_layer else self._name(i + 1, self._norms[i + 1].mixer)
            normed, hidden = self._joined(out, hidden, following, weight)
        return normed, present, columns

    def _shared(self, call: Call) -> Callable[[str], Any]:
        """Return a function that computes what all layers of a kind share. It does so once for each kind."""

        @cache
        def shared(layer_type: str) -> Any:
            kind = self._member.kind(self._config, layer_type)
            return kind.prepare(call, self._config, self._rotary.get(layer_type))

        return shared

    def _name(self, layer: int, norm: str | None) -> str | None:
        return None if norm is None else f"layers.{layer}.{norm}"

    def _normed(self, x: torch.Tensor, norm: str | None, weight: Weight) -> torch.Tensor:
        """Apply the norm of this name, if there is one."""
        return x if norm is None else ops.rms_norm(x, weight(f"{self._prefix}{norm}.weight"), self._epsilon)

    def _joined(
        self, out: torch.Tensor, hidden: torch.Tensor, norm: str | None, weight: Weight
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a block's output to the residual stream. Return what the next block takes, and the stream."""
        out = scaled(out, self._factors.residual)
        if norm is None:
            return (out + hidden,) * 2
        return ops.skip_rms_norm(out, hidden, weight(f"{self._prefix}{norm}.weight"), self._epsilon)


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply by a factor. It is no node where the factor is 1."""
    return x if factor == 1 else x * factor


def language_model(
    decoder: Decoder,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor,
    past: Caches | None,
    num_logits_to_keep: torch.Tensor | None,
    weight: Weight,
    dtype: torch.dtype,
    enter: Callable[[torch.Tensor, Weight], torch.Tensor],
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]], list[tuple[torch.Tensor, ...]]]:
    """Run a decoder with its entry, and with its head if `num_logits_to_keep` is given.

    Args:
        tokens: what `enter` takes: int64 (batch_size, sequence_length), or (batch_size, sequence_length, hidden_size).
        attention_mask: int64 (batch_size, past_sequence_length + sequence_length).
        past: one tuple of caches a layer, or None.
        num_logits_to_keep: int64, a scalar or one element; None for a model without a head.
        enter: makes hidden states of the tokens: `Decoder.embed` or `Decoder.enter`.

    Returns:
        Logits (batch_size, num_logits, vocab_size) or hidden states (batch_size, sequence_length, hidden_size), and the
        present caches and the columns that the call adds to states, one tuple a layer each.
    """
    call = read_call(tokens, attention_mask, dtype)
    hidden, present, columns = decoder.layers(enter(tokens, weight), call, past, num_logits_to_keep, weight)
    if num_logits_to_keep is None:
        return shapes.named(hidden), present, columns
    return decoder.head(hidden, weight), present, columns
