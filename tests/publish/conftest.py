"""Fixtures: folders with two precisions that `optimum-cli export lfm2` wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from publishing import TRAINED, run


@pytest.fixture(scope="session")
def two(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("publish") / "two"
    assert run("--model", TRAINED, out, "--precisions", "q4", "fp32") == 0
    return out


@pytest.fixture
def small(two, tmp_path) -> Path:
    """A copy of a folder with fp32 and q4. A test may write to it."""
    return shutil.copytree(two, tmp_path / "work" / "small")
