"""The README's snippets run without changes, and its links lead to files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from embedding import make_embedding, states_alone
from optimum.exporters.onnx import main_export


# In the snippets that README's first installation does not suffice for. `test_processor.py` runs that of pictures.
OF_ENCODERS, OF_PICTURES = "sentence_transformers", "AutoProcessor"
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_snippets_answer(exported, tmp_path, monkeypatch, capsys):
    """One after the other, as a reader runs them."""
    others = (OF_ENCODERS, OF_PICTURES)
    snippet = "".join(one for one in snippets("python") if not any(name in one for name in others))
    shutil.copytree(exported("trained"), tmp_path / "lfm2_onnx")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        "3 plus 4 is 7.",
        *["The silver key is next to the well. Ben put it there."] * 3,
    ]


def test_the_snippet_of_an_encoder_embeds_two_sentences(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    source = make_embedding(tmp_path)
    main_export(str(source), tmp_path / "embedding_onnx", do_validation=False)
    monkeypatch.chdir(tmp_path)
    (snippet,) = (snippet for snippet in snippets("python") if OF_ENCODERS in snippet)
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    texts = ["document: Where is the silver key?", "document: Ben put it next to the well."]
    expected = torch.stack([torch.nn.functional.normalize(states[0], dim=0) for states in states_alone(source, texts)])
    torch.testing.assert_close(torch.from_numpy(names["vectors"]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)", README))))
def test_links_lead_somewhere(path):
    assert (Path(__file__).parent.parent / path).exists()
