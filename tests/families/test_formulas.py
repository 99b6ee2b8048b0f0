"""Rotary tables, norms and ties against formulas of our own: transformers may be wrong, and the graph with it."""

from __future__ import annotations

import json
from pathlib import Path

import formulas
import numpy as np
import pytest
import torch
from checkpoints import ATTENTION, SLIDING, make_checkpoint, prompts
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from safetensors.numpy import load_file

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import member_of
from optimum_lfm2.loading.config_check import loaded_config
from optimum_lfm2.loading.models import weightless
from optimum_lfm2.loading.supported import check_architecture
from optimum_lfm2.loading.tasks_manager import Lfm2TasksManager


needs_lfm3 = pytest.mark.skipif("lfm3" in compat.STAND_INS, reason="this transformers has no lfm3")
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 4096}
YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 5e4, "factor": 3.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, **YARN},
    "yarn, another ramp": {"rope_type": "yarn", "rope_theta": 1e6, **YARN, "beta_fast": 16.0, "beta_slow": 2.0},
}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
# As published, what is meant by it, and the same said in the other ways.
OF_LFM3 = {
    "as published": (PROPORTIONAL | {"rope_type": "default"}, PROPORTIONAL),
    "without a type": ({"rope_theta": 1e6, "partial_rotary_factor": 0.5}, PROPORTIONAL),
    "proportional": (PROPORTIONAL, PROPORTIONAL),
    "a quarter": (
        PROPORTIONAL | {"rope_type": "default", "partial_rotary_factor": 0.25},
        PROPORTIONAL | {"partial_rotary_factor": 0.25},
    ),
    "trained by transformers 5.24": (
        PROPORTIONAL | {"rope_type": "default", "partial_rotary_factor": 1.0},
        {"rope_type": "default", "rope_theta": 1e6},
    ),
}


def written(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tables(folder: Path) -> dict:
    """The tables that the graph gets and those of validation's reference are both read of this model."""
    config = Lfm2TasksManager.infer_library_from_model(str(folder)) and loaded_config(folder)
    compat.spell_rope_for_both(config)
    return member_of(config).rotary(weightless(config, "text-generation", torch.float32))


def assert_table(table: tuple[torch.Tensor, float], rope: dict, dim: int) -> None:
    angles, scale = formulas.rope(rope, dim)
    np.testing.assert_allclose(table[0].numpy(), angles, rtol=2e-6)
    assert table[1] == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", ROPES)
def test_tables_of_lfm2(rope, place, tmp_path):
    nested = dict(ROPES[rope])
    top = {} if place == "rope_parameters" else {"rope_theta": nested.pop("rope_theta")}
    config = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config |= {"layer_types": [ATTENTION], "vocab_size": 16, "pad_token_id": 0}
    # transformers 4.57 divides the longest position by that of training, where 5 has the factor
    config |= {"max_position_embeddings": int(4096 * nested.get("factor", 1))}
    folder = written(tmp_path, model_type="lfm2", **config, **top, **{place: nested})
    assert_table(tables(folder)[ATTENTION], ROPES[rope], 64)


@needs_lfm3
@pytest.mark.parametrize("rope", [*OF_LFM3, *ROPES])
def test_tables_of_lfm3(rope, tmp_path):
    said, meant = OF_LFM3.get(rope) or (ROPES[rope], ROPES[rope])
    sliding = {"rope_theta": 10000, "rope_type": "default"}
    config = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config |= {"layer_types": [ATTENTION, SLIDING], "vocab_size": 16, "head_dim": 128}
    config |= {"pad_token_id": 0, "max_position_embeddings": 16384, "sliding_window": 8}
    folder = written(tmp_path, model_type="lfm3", **config, rope_parameters={ATTENTION: said, SLIDING: sliding})
    found = tables(folder)
    assert_table(found[ATTENTION], meant, 128)
    assert_table(found[SLIDING], sliding, 128)


def test_the_published_table_by_its_readme():
    angles, _ = formulas.rope(PROPORTIONAL, 128)
    assert angles.tolist() == [1e6 ** (-2 * i / 128) for i in range(32)] + [0] * 32


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_part_of_a_head_under_another_type_is_refused(kind):
    """Of a part transformers makes a shorter table there, and then fails."""
    ropes = {ATTENTION: ROPES[kind] | {"partial_rotary_factor": 0.5}}
    config = {"model_type": "lfm3", "architectures": ["Lfm3ForCausalLM"], "rope_parameters": ropes}
    if "lfm3" in compat.STAND_INS:
        config["model_type"], match = "lfm2", "partial_rotary_factor in rope_parameters"
    else:
        match = f"partial_rotary_factor 0.5 beside {kind}"
    with pytest.raises(Lfm2Error, match=match):
        check_architecture(config)


MODELS = {
    "lfm2": ("hybrid", {}),
    "lfm2, untied, in other widths": ("untied", {"hidden_size": 48, "num_key_value_heads": 1, "norm_eps": 0.1}),
    "lfm3": ("lfm3", {}),
    "lfm3, without what it has besides": ("lfm3", {"use_sandwich_norm": False, "use_attention_gate": False}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, tmp_path):
    """An export and a text-book model agree on norms, ties, rotations, windows and gates."""
    of_table, changes = MODELS[name]
    source = make_checkpoint(of_table, tmp_path, **changes)
    config = json.loads((source / "config.json").read_text())
    main_export(str(source), tmp_path / "out", do_validation=False)
    ropes = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    config["ropes"] = ropes if SLIDING in ropes else {ATTENTION: ropes}
    (ids,) = prompts([40])
    own = formulas.logits(config, load_file(source / "model.safetensors"), ids.numpy())
    logits = ORTModelForCausalLM.from_pretrained(tmp_path / "out")(ids[None]).logits[0]
    np.testing.assert_allclose(logits.numpy(), own, atol=2e-4)
