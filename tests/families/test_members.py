"""A member's type stands in its own file, in the list of members, and where a release of transformers lacks it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import optimum_lfm2
from optimum_lfm2.compat import LATER_MODELS
from optimum_lfm2.families import MEMBERS, MODEL_TYPES


PACKAGE = Path(optimum_lfm2.__file__).parent
DENSE = MEMBERS[0].model_type


@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) & set(LATER_MODELS)))
def test_no_other_file_names_it(model_type):
    """Only a member whose name is no part of another's can be looked for: lfm2 is part of the package's."""
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if model_type in path.read_text()}
    assert files == {f"families/{model_type}.py", "families/__init__.py", "compat.py"}


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
