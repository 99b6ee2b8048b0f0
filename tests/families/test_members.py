"""A member's type stands in its own file, in the list of members, and where a release of transformers lacks it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import optimum_lfm2
from optimum_lfm2.compat import LATER_MODELS
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import MEMBERS, MODEL_TYPES, encoder, lfm2_moe, lfm2_vl, lfm3, lfm3_vl, member_of
from optimum_lfm2.loading.config_check import check_fields
from optimum_lfm2.weights.blocks import SCHEMES


PACKAGE = Path(optimum_lfm2.__file__).parent
DENSE = MEMBERS[0].model_type


def test_a_type_that_is_not_ours_has_no_record():
    with pytest.raises(KeyError, match="llama"):
        member_of({"model_type": "llama"})


@pytest.mark.parametrize(
    ("member", "config", "says"),
    [
        (lfm2_moe, {"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        (lfm3, {"layer_types": ["sliding_attention"], "sliding_window": None}, "sliding_window in config.json is None"),
        (
            lfm3,
            {"layer_types": ["conv", "sliding_attention"], "sliding_window": 0},
            "sliding_window in config.json is 0",
        ),
        (encoder, {"id2label": {"0": "A", "2": "B"}}, "names the labels 0, 2"),
        (lfm2_vl, {"vision_config": {"num_patches": 15}}, "num_patches .* is 15, which is no square"),
        (lfm2_vl, {"vision_config": {"hidden_size": 48, "num_attention_heads": 5}}, "5 does not divide hidden_size 48"),
        (lfm2_vl, {"vision_config": {"patch_size": 0}}, "patch_size in the vision_config .* is 0"),
        (lfm3_vl, {"vision_config": {"conv_kernel_size": 2}}, "conv_kernel_size .* is 2; it has to be odd"),
        (lfm3_vl, {"vision_config": {"hidden_size": 36, "num_attention_heads": 6}}, "multiple of 4 .*, 24"),
        (lfm3_vl, {"vision_config": {"num_key_value_heads": 5}}, "5, which does not divide num_attention_heads 16"),
        (lfm3_vl, {"vision_config": {"head_dim": 32}}, "head_dim .* is 32, and .* 64"),
        (lfm3_vl, {"vision_config": {"layer_types": ["conv"]}}, "has 1 layers, and num_hidden_layers is 14"),
        (lfm3_vl, {"vision_config": {"rope_parameters": {"rope_type": "default"}}}, "the rope_type axial"),
    ],
)
def test_what_a_record_refuses(member, config, says):
    with pytest.raises(Lfm2Error, match=says) as error:
        member.MEMBER.check(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("member", "config"),
    [
        (lfm2_moe, {"num_experts": 4, "num_experts_per_tok": 4}),
        (lfm2_moe, {"num_experts_per_tok": 4}),
        (lfm2_moe, {"num_experts": 4}),
        (lfm3, {"layer_types": ["sliding_attention"], "sliding_window": 1}),
        (lfm3, {"layer_types": ["conv"], "sliding_window": None}),
        (encoder, {"id2label": {"1": "A", "0": "B"}}),
        (encoder, {}),
        (lfm2_vl, {"vision_config": {"num_patches": 16, "hidden_size": 48, "num_attention_heads": 4}}),
        (lfm3_vl, {"vision_config": {"head_dim": 64, "layer_types": None, "rope_parameters": None}}),
    ],
)
def test_what_a_record_takes(member, config):
    member.MEMBER.check(config)


def test_experts_in_few_bits_have_whole_blocks():
    def widths(hidden: int, expert: int) -> SimpleNamespace:
        return SimpleNamespace(hidden_size=hidden, moe_intermediate_size=expert)

    lfm2_moe.MEMBER.check_scheme(SCHEMES["q4"], widths(64, 48))  # blocks of 16
    with pytest.raises(Lfm2Error, match=r"\(64 and 24\) must be multiples of 16"):
        lfm2_moe.MEMBER.check_scheme(SCHEMES["q4"], widths(64, 24))


def test_fields_that_are_not_there_have_defaults():
    check_fields({"model_type": "lfm2"})
    check_fields({"model_type": "lfm2", "pad_token_id": 0})
    check_fields({"model_type": "lfm2", "vocab_size": 8, "pad_token_id": 7})


@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) & set(LATER_MODELS)))
def test_no_other_file_names_it(model_type):
    """As a word: `lfm3` is not named by `lfm3_vl`, nor that by `modeling_lfm3_vl`. A member may build on another."""
    word = re.compile(rf"\b{model_type}\b")
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if word.search(path.read_text())}
    assert files >= {f"families/{model_type}.py", "families/__init__.py"}
    assert {file for file in files if not file.startswith("families/")} == {"compat.py"}


def test_no_code_elsewhere_has_the_type_of_a_member_that_is_not_the_dense_one():
    """Not even one whose file has another name, as `vision.py`: no string of the code equals its type."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        found[path.relative_to(PACKAGE).as_posix()] = texts & (set(MODEL_TYPES) - {DENSE})
    named = {file: types for file, types in found.items() if types}
    assert named.pop("compat.py") == {*LATER_MODELS, "lfm2-vl"}
    assert all(file.startswith("families/") and len(types) <= 2 for file, types in named.items())
    assert set().union(*named.values()) == set(MODEL_TYPES) - {DENSE}
