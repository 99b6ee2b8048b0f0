"""A tiny model and a server of it. What needs transformers 5.24 is imported by the tests that ask for it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(exported, tmp_path_factory) -> Path:
    """The trained model with LFM2's tokens for tool calls."""
    from servers import with_tool_tokens

    return with_tool_tokens(exported("trained"), tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def loaded(folder):
    from optimum_lfm2.serving.folder import load_folder

    return load_folder(folder)


@pytest.fixture(scope="module")
def served(loaded):
    """The address of a server, its managers and the server itself."""
    from servers import serving

    with serving(loaded) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    import openai

    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0, timeout=120)
