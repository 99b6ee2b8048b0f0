"""`genai_config.json`: what onnxruntime-genai has to know of an exported folder to run it unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from optimum_lfm2.caches import CacheTensor, head_dim


GENAI_CONFIG = "genai_config.json"
TOKENIZER = "tokenizer.json"
LAYER = "%d"


def write_genai_config(folder: Path, filename: str, config: PretrainedConfig, caches: Iterable[CacheTensor]) -> bool:
    """Write `genai_config.json` beside the tokenizer; without one there is nothing that onnxruntime-genai could run.

    Args:
        folder: where the tokenizer and `config.json` lie.
        filename: the model's file, relative to `folder`.
        caches: the graph's cache tensors.

    Returns:
        Whether the file was written.
    """
    if not (folder / TOKENIZER).is_file():
        return False
    generation = _read(folder / "generation_config.json")
    text = json.dumps(genai_config(filename, config, caches, generation), indent=2) + "\n"
    (folder / GENAI_CONFIG).write_text(text, encoding="utf-8")
    return True


def genai_config(
    filename: str, config: PretrainedConfig, caches: Iterable[CacheTensor], generation: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of `genai_config.json`.

    `num_logits_to_keep` is not named: it has a default in the graph, which keeps all that onnxruntime-genai expects.

    Args:
        generation: the checkpoint's `generation_config.json`: its tokens and sampling settings go before the config's.
    """
    past: dict[str, str] = {}
    present: dict[str, str] = {}
    for tensor in caches:
        past[f"past_{tensor.kind}_names"] = _template(tensor.past, tensor.layer)
        present[f"present_{tensor.kind}_names"] = _template(tensor.present, tensor.layer)

    def token(name: str) -> Any:
        value = generation.get(name)
        return getattr(config, name, None) if value is None else value

    eos, pad = token("eos_token_id"), token("pad_token_id")
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    model: dict[str, Any] = {
        "type": config.model_type,
        "bos_token_id": token("bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": pad,
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "decoder": {
            "filename": filename,
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "hidden_size": config.hidden_size,
            "head_size": head_dim(config),
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "layer_types": list(config.layer_types),
            "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **past},
            "outputs": {"logits": "logits", **present},
        },
    }
    return {"model": model, "search": _search(config, generation)}


def _template(name: str, layer: int) -> str:
    """A cache's name with a place for the layer's number; no other part of a name is a number."""
    return name.replace(str(layer), LAYER)


def _search(config: PretrainedConfig, generation: Mapping[str, Any]) -> dict[str, Any]:
    search: dict[str, Any] = {
        "do_sample": False,
        "early_stopping": True,
        "max_length": config.max_position_embeddings,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "past_present_share_buffer": False,
    }
    settings = ("do_sample", "repetition_penalty", "temperature", "top_k", "top_p")
    return search | {name: generation[name] for name in settings if generation.get(name) is not None}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
