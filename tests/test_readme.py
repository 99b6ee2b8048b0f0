"""The README's snippets run without changes, and its links lead to files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest


README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_snippets_answer(exported, tmp_path, monkeypatch, capsys):
    """One after the other, as a reader runs them."""
    snippet = "".join(snippets("python"))
    shutil.copytree(exported("trained"), tmp_path / "lfm2_onnx")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        "3 plus 4 is 7.",
        *["The silver key is next to the well. Ben put it there."] * 3,
    ]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)", README))))
def test_links_lead_somewhere(path):
    assert (Path(__file__).parent.parent / path).exists()
