"""LFM2 and LFM3 in numpy, float64, written from the papers and the model cards and not from transformers' code.

transformers' models are the gold of all other tests. A fault that it shares with an export shows only here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def rope(parameters: Mapping[str, Any], dim: int) -> tuple[np.ndarray, float]:
    """Return the angle a position of each pair of a head, (dim / 2), and the factor of cosine and sine."""
    kind, theta = parameters.get("rope_type", "default"), parameters["rope_theta"]
    pairs = np.arange(dim // 2)
    plain = theta ** (-2.0 * pairs / dim)
    factor = parameters.get("factor", 1.0)
    if kind == "linear":  # position interpolation, arXiv 2306.15595
        return plain / factor, 1.0
    if kind == "proportional":  # the first pairs turn as in a whole head, the others stand still
        return np.where(pairs < parameters["partial_rotary_factor"] * dim / 2, plain, 0), 1.0
    if kind == "llama3":  # the Llama 3.1 report: long waves are stretched, short ones stay
        length = parameters["original_max_position_embeddings"]
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        turns = length * plain / (2 * math.pi)  # within the length of training
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return kept * plain + (1 - kept) * plain / factor, 1.0
    if kind == "yarn":  # arXiv 2309.00071, with the ramp over pairs that its repository has
        length = parameters["original_max_position_embeddings"]

        def pair(turns: float) -> float:  # which makes so many turns within the length of training
            return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(pair(parameters.get("beta_fast", 32))), 0)
        last = min(math.ceil(pair(parameters.get("beta_slow", 1))), dim - 1)
        stretched = np.clip((pairs - first) / max(last - first, 1e-3), 0, 1)
        return stretched * plain / factor + (1 - stretched) * plain, 0.1 * math.log(factor) + 1
    assert kind == "default", kind
    return plain, 1.0


def norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Divide by the root of the mean square over the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def logits(config: Mapping[str, Any], stored: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Compute the logits of one row, (length, vocabulary).

    Args:
        config: `layer_types`, `norm_eps`, the widths and the ropes by the kind of layer (`ropes`).
        stored: the tensors of the checkpoint's file.
        ids: int64 (length).
    """
    weights = {name: tensor.astype(np.float64) for name, tensor in stored.items()}
    epsilon = config["norm_eps"]
    table = weights["model.embed_tokens.weight"]
    hidden = table[ids]
    for i, kind in enumerate(config["layer_types"]):
        layer = {
            name.removeprefix(f"model.layers.{i}."): value
            for name, value in weights.items()
            if name.startswith(f"model.layers.{i}.")
        }
        x = norm(hidden, layer["operator_norm.weight"], epsilon)
        mixed = convolution(layer, x) if kind == "conv" else attention(config, layer, kind, x)
        hidden = hidden + after(layer, "post_operator_norm", mixed, epsilon)
        x = norm(hidden, layer["ffn_norm.weight"], epsilon)
        gate = x @ layer["feed_forward.w1.weight"].T
        fed = (gate * sigmoid(gate) * (x @ layer["feed_forward.w3.weight"].T)) @ layer["feed_forward.w2.weight"].T
        hidden = hidden + after(layer, "post_ffn_norm", fed, epsilon)
    hidden = norm(hidden, weights["model.embedding_norm.weight"], epsilon)
    return hidden @ weights.get("lm_head.weight", table).T


def after(layer: Mapping[str, np.ndarray], name: str, x: np.ndarray, epsilon: float) -> np.ndarray:
    """LFM3's norms after the blocks."""
    weight = layer.get(f"{name}.weight")
    return x if weight is None else norm(x, weight, epsilon)


def convolution(layer: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """y[t] = C[t] · Σ_j w[j] · (B · x)[t - L + 1 + j]"""
    b, c, inner = np.split(x @ layer["conv.in_proj.weight"].T, 3, axis=-1)
    kernel = layer["conv.conv.weight"][:, 0]  # (width, taps)
    taps = kernel.shape[1]
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), b * inner])
    mixed = sum(padded[j : j + len(x)] * kernel[:, j] for j in range(taps))
    return (c * mixed) @ layer["conv.out_proj.weight"].T


def attention(config: Mapping[str, Any], layer: Mapping[str, np.ndarray], kind: str, x: np.ndarray) -> np.ndarray:
    length, heads, groups = len(x), config["num_attention_heads"], config["num_key_value_heads"]
    part = {name.removeprefix("self_attn."): value for name, value in layer.items() if name.startswith("self_attn.")}
    norms = "layernorm" if "q_layernorm.weight" in part else "norm"

    def project(name: str, count: int) -> np.ndarray:  # (heads, length, head_dim)
        return (x @ part[f"{name}_proj.weight"].T).reshape(length, count, -1).swapaxes(0, 1)

    def turned(name: str, count: int) -> np.ndarray:
        normed = norm(project(name, count), part[f"{name}_{norms}.weight"], config["norm_eps"])
        angles, scale = rope(config["ropes"][kind], normed.shape[-1])
        angles = np.arange(length)[:, None] * angles
        one, other = np.split(normed, 2, axis=-1)  # pairs are (i, i + head_dim / 2)
        cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
        return np.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)

    query, key, value = turned("q", heads), turned("k", groups), project("v", groups)
    key, value = (np.repeat(each, heads // groups, axis=0) for each in (key, value))
    scores = query @ key.swapaxes(1, 2) / math.sqrt(query.shape[-1])
    distance = np.arange(length)[:, None] - np.arange(length)
    window = config["sliding_window"] if kind == "sliding_attention" else length
    scores = np.where((distance >= 0) & (distance < window), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    context = (shares / shares.sum(-1, keepdims=True)) @ value
    if "gate_proj.weight" in part:  # one gate a head
        context = context * sigmoid(x @ part["gate_proj.weight"].T).T[:, :, None]
    out = part.get("out_proj.weight", part.get("o_proj.weight"))
    return context.swapaxes(0, 1).reshape(length, -1) @ out.T
