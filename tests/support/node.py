"""What the tests of Transformers.js in node need."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


WEB = Path(__file__).parents[2] / "examples" / "web"
INSTALLED = (WEB / "node_modules" / "@huggingface" / "transformers").is_dir()

NEEDS_NODE = [
    pytest.mark.skipif(not shutil.which("node"), reason="no node on the PATH"),
    pytest.mark.skipif(not INSTALLED, reason="no node_modules: run `npm ci --ignore-scripts` in examples/web"),
]


def needs_node(test):
    """Skip a test where node or its packages lack."""
    for mark in NEEDS_NODE:
        test = mark(test)
    return test
