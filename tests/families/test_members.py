"""A member's type stands in its own file, in the list of members, and where a release of transformers lacks it."""

from __future__ import annotations

from pathlib import Path

import pytest

import optimum_lfm2
from optimum_lfm2.compat import LATER_MODELS
from optimum_lfm2.families import MODEL_TYPES


PACKAGE = Path(optimum_lfm2.__file__).parent


@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) & set(LATER_MODELS)))
def test_no_other_file_names_it(model_type):
    """Only a member whose name is no part of another's can be looked for: lfm2 is part of the package's."""
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if model_type in path.read_text()}
    assert files == {f"families/{model_type}.py", "families/__init__.py", "compat.py"}
