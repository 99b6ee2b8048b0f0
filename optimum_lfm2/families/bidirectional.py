"""The encoders in torch, made of transformers' LFM2 modules. Validation compares the graphs with them.

transformers 5.24 has no such models, and each checkpoint brings code of its own. These classes follow the architecture.
They differ from the decoder in two things: attention sees all unmasked tokens of a row, and convolutions are centred.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Lfm2Config
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.lfm2.modeling_lfm2 import (
    Lfm2DecoderLayer,
    Lfm2PreTrainedModel,
    Lfm2RMSNorm,
    Lfm2RotaryEmbedding,
    Lfm2ShortConv,
)


MASKED = -1e4


class CentredConv(Lfm2ShortConv):
    """LFM2's gated convolution, whose kernel of k columns begins k // 2 columns before the token."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        length, width = hidden_states.shape[1:]
        input_gate, output_gate, x = self.in_proj(hidden_states).transpose(1, 2).chunk(3, dim=1)
        gated = input_gate * x
        if attention_mask is not None:
            gated = gated * attention_mask[:, None]
        weight = self.conv.weight
        mixed = F.conv1d(gated, weight, self.conv.bias, padding=weight.shape[2] // 2, groups=width)[..., :length]
        return self.out_proj((output_gate * mixed).transpose(1, 2).contiguous())


class Lfm2BidirectionalModel(Lfm2PreTrainedModel):
    """The encoder without a head. Its parameters are named as in a checkpoint that has none."""

    base_model_prefix = "lfm2"

    def __init__(self, config: Lfm2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([Lfm2DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        layer: Any
        for i, layer in enumerate(self.layers):
            if layer.is_attention_layer:
                layer.self_attn.is_causal = False
            else:
                layer.conv = CentredConv(config, i)
        self.rotary_emb = Lfm2RotaryEmbedding(config)
        self.embedding_norm = Lfm2RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> BaseModelOutput:
        """Compute the final hidden states.

        Args:
            input_ids: int64 (batch_size, sequence_length).
            attention_mask: int64 (batch_size, sequence_length), 0 on padding, on either side. None hides nothing.

        Returns:
            `last_hidden_state`, (batch_size, sequence_length, hidden_size).
        """
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        bias = None
        if attention_mask is not None:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            bias = (1.0 - attention_mask[:, None, None].to(hidden.dtype)) * MASKED
            bias = bias.expand(-1, 1, input_ids.shape[1], -1)
        rotary = self.rotary_emb(hidden, position_ids=positions)
        for layer in self.layers:
            mask = bias if layer.is_attention_layer else attention_mask
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return BaseModelOutput(last_hidden_state=self.embedding_norm(hidden))


class _WithHead(Lfm2PreTrainedModel):
    """An encoder under a head."""

    base_model_prefix = "lfm2"

    def __init__(self, config: Lfm2Config) -> None:
        super().__init__(config)
        self.lfm2 = Lfm2BidirectionalModel(config)

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.lfm2(input_ids, attention_mask).last_hidden_state


class Lfm2BidirectionalForMaskedLM(_WithHead):
    """The encoder with the head of a masked language model, tied to the embedding unless the configuration says not."""

    def __init__(self, config: Lfm2Config) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.lfm2.embed_tokens.weight

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> MaskedLMOutput:
        """Compute `logits`, (batch_size, sequence_length, vocab_size)."""
        return MaskedLMOutput(logits=self.lm_head(self.hidden_states(input_ids, attention_mask)))


class Lfm2BidirectionalForTokenClassification(_WithHead):
    """The encoder with a linear head on every token."""

    def __init__(self, config: Lfm2Config) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> TokenClassifierOutput:
        """Compute `logits`, (batch_size, sequence_length, num_labels)."""
        return TokenClassifierOutput(logits=self.classifier(self.hidden_states(input_ids, attention_mask)))


class Lfm2BidirectionalForSequenceClassification(_WithHead):
    """The encoder with a linear head on the first unmasked token of each row."""

    def __init__(self, config: Lfm2Config) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Compute `logits`, (batch_size, num_labels)."""
        hidden = self.hidden_states(input_ids, attention_mask)
        first = torch.zeros(len(hidden), dtype=torch.int64) if attention_mask is None else attention_mask.argmax(1)
        return SequenceClassifierOutput(logits=self.classifier(hidden[torch.arange(len(hidden)), first]))


MODELS = {
    "feature-extraction": Lfm2BidirectionalModel,
    "fill-mask": Lfm2BidirectionalForMaskedLM,
    "token-classification": Lfm2BidirectionalForTokenClassification,
    "text-classification": Lfm2BidirectionalForSequenceClassification,
}
for _model in MODELS.values():
    # Optimum tells by the module of a model's class which library it is of, and takes no other word (2.1).
    _model.__module__ = Lfm2PreTrainedModel.__module__
