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
        self._post_norms = member.post_norms(config) or (None, None)

    def embed(self, input_ids: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Embed ids: int64 (batch_size, sequence_length) → hidden states (batch_size, sequence_length, hidden_size)."""
        return ops.embedding(weight(f"{self._prefix}embed_tokens.weight"), input_ids)

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
        config, epsilon = self._config, self._config.norm_eps
        last_layer = config.num_hidden_layers - 1
        shared = self._shared(call)
        present: list[tuple[torch.Tensor, ...]] = []
        columns: list[tuple[torch.Tensor, ...]] = []

        normed = ops.rms_norm(hidden, self._norm(weight, "layers.0.operator_norm"), epsilon)
        for i in range(config.num_hidden_layers):
            kind, name = self._kinds[i], f"layers.{i}"
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
            out = self._post_norm(out, weight, name, 0)
            normed, hidden = ops.skip_rms_norm(out, hidden, self._norm(weight, f"{name}.ffn_norm"), epsilon)
            out = self._feed_forwards[i](normed, weight, f"{self._prefix}{name}.feed_forward")
            out = self._post_norm(out, weight, name, 1)
            next_norm = "embedding_norm" if i == last_layer else f"layers.{i + 1}.operator_norm"
            normed, hidden = ops.skip_rms_norm(out, hidden, self._norm(weight, next_norm), epsilon)
        return normed, present, columns

    def _shared(self, call: Call) -> Callable[[str], Any]:
        """Return a function that computes what all layers of a kind share. It does so once for each kind."""

        @cache
        def shared(layer_type: str) -> Any:
            kind = self._member.kind(self._config, layer_type)
            return kind.prepare(call, self._config, self._rotary.get(layer_type))

        return shared

    def _norm(self, weight: Weight, name: str) -> torch.Tensor:
        return weight(f"{self._prefix}{name}.weight")

    def _post_norm(self, out: torch.Tensor, weight: Weight, layer: str, which: int) -> torch.Tensor:
        norm = self._post_norms[which]
        if norm is None:
            return out
        return ops.rms_norm(out, self._norm(weight, f"{layer}.{norm}"), self._config.norm_eps)


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
    return ops.linear(hidden, weight("lm_head.weight")), present, columns
