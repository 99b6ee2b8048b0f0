"""Links of the pages lead somewhere, their commands are such that a parser takes them, their snippets run."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from embedding import make_embedding, states_alone
from optimum.exporters.onnx import main_export
from pages import ROOT, anchors, commands, links, pages, read, snippets
from transformers import AutoTokenizer


PAGES = pages()
# In README's snippets that need more than its first installation. `test_processor.py` runs that of pictures.
OF_ENCODERS, OF_PICTURES = "sentence_transformers", "AutoProcessor"


@pytest.mark.once
def test_the_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "docs/performance.md", "demo/README.md"} <= set(PAGES)


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT.resolve()))), f"{path}#{anchor}"


@pytest.mark.once
@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/develop.md"])
def test_files_that_are_named_exist(page):
    places = (ROOT, ROOT / "optimum_lfm2", ROOT / "optimum" / "commands" / "lfm2", ROOT / "optimum" / "commands")
    for name in re.findall(r"`([\w./]+(?:\.py|/))`", read(page)):
        assert any((place / name).exists() for place in places), name


class ParsedError(Exception):
    """The parser took the arguments."""


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES)
def test_commands_are_taken(page, monkeypatch):
    """Nothing runs: of `optimum-cli` and of the benchmarks the arguments are parsed, of `make` the target is there."""
    from optimum.commands.optimum_cli import main

    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: object) -> None:
        raise ParsedError(parse(self, *args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands(page):
        if words[:1] == ["optimum-cli"]:
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(ParsedError):
                main()
        elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks"):
            monkeypatch.setattr(sys, "argv", words[2:])
            with pytest.raises(ParsedError):
                importlib.import_module(words[2]).main()
        elif words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), words


def run(code: str, page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(code, page, "exec"), names)
    return names


def readme_chat() -> str:
    others = (OF_ENCODERS, OF_PICTURES)
    (snippet,) = (one for one in snippets("README.md") if not any(name in one for name in others))
    return snippet


def test_readme_chats(exported, tmp_path, monkeypatch, capsys):
    (tmp_path / "lfm2_onnx").symlink_to(exported("trained", variant="q4"))
    run(readme_chat(), "README.md", tmp_path, monkeypatch)
    assert capsys.readouterr().out == "The silver key is next to the well. Ben put it there.\n"


def test_chats_answer(exported, tmp_path, monkeypatch, capsys):
    """One after the other, as a reader runs them."""
    (tmp_path / "lfm2_onnx").symlink_to(exported("trained"))
    run("".join(snippets("docs/chats.md")), "docs/chats.md", tmp_path, monkeypatch)
    *answers, name, story = capsys.readouterr().out.splitlines()
    key = "The silver key is next to the well. Ben put it there."
    assert answers == ["3 plus 4 is 7.", key, "3 plus 4 is 7.", key, key]
    assert name == "ORTLfm2ForCausalLM"
    assert story.startswith("Once upon a time there was")


def test_runtimes_answer(hub_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime_genai")
    (tmp_path / "lfm2_hub").symlink_to(hub_folder)
    run("".join(snippets("docs/deploy.md")), "docs/deploy.md", tmp_path, monkeypatch)
    assert capsys.readouterr().out == "3 plus 4 is 7.\n" * 2


def test_genai_adds_no_start_token_and_takes_a_written_one(hub_folder):
    og = pytest.importorskip("onnxruntime_genai")
    tokenizer = og.Tokenizer(og.Model(str(hub_folder)))
    plain, started = (list(tokenizer.encode(f"{start}Once upon a time")) for start in ("", "<|startoftext|>"))
    assert started == [1, *plain] == AutoTokenizer.from_pretrained(hub_folder)("Once upon a time")["input_ids"]


def test_main_export_takes_the_options(tmp_path, monkeypatch):
    (snippet,) = (one for one in snippets("docs/options.md") if "peft" not in one)  # the tests have no peft
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    names = run(snippet, "docs/options.md", tmp_path, monkeypatch)
    assert names["model"].layout.gives_columns


def test_drafts_change_no_answer(exported, tmp_path, monkeypatch):
    (tmp_path / "lfm2_onnx").symlink_to(exported("trained"))
    (snippet,) = snippets("docs/speculative.md")
    before = 'plain = out\nsmall = ORTLfm2ForCausalLM.from_pretrained("lfm2_onnx")\n'
    looked_up, drafted = snippet.splitlines()
    code = f"{readme_chat()}{before}{looked_up}\nfirst = out\n{drafted}\n"
    names = run(code, "docs/speculative.md", tmp_path, monkeypatch)
    assert names["plain"].equal(names["first"])
    assert names["plain"].equal(names["out"])


@pytest.mark.once
def test_no_snippet_is_forgotten():
    """`test_processor.py` runs those of docs/vision.md, and `test_serve_tools.py` that of docs/serving.md."""
    known = {
        "README.md",
        *(f"docs/{name}.md" for name in ("chats", "deploy", "options", "serving", "speculative", "vision")),
    }
    assert {page for page in PAGES if snippets(page)} == known


def test_readme_embeds_two_sentences(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    source = make_embedding(tmp_path)
    main_export(str(source), tmp_path / "embedding_onnx", do_validation=False)
    (snippet,) = (one for one in snippets("README.md") if OF_ENCODERS in one)
    names = run(snippet, "README.md", tmp_path, monkeypatch)
    texts = ["document: Where is the silver key?", "document: Ben put it next to the well."]
    expected = torch.stack([torch.nn.functional.normalize(states[0], dim=0) for states in states_alone(source, texts)])
    torch.testing.assert_close(torch.from_numpy(names["vectors"]), expected, atol=1e-4, rtol=0)


@pytest.mark.once
def test_readme_is_short():
    assert len(read("README.md").split()) <= 1000


@pytest.mark.once
def test_forms_and_workflows_can_be_read():
    files = sorted((ROOT / ".github").rglob("*.yml"))
    read_files = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}
    for name in ("bug", "new_member"):
        assert all(field["attributes"]["label"] for field in read_files[name]["body"])
    job = read_files["ci"]["jobs"]["test"]
    assert job["steps"][-1]["run"] == "make ${{ matrix.target }}"
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert set(job["strategy"]["matrix"]["target"]) == set(re.findall(r"^make (test\S*)$", script, flags=re.MULTILINE))
    assert f"TORCH={job['env']['TORCH']} " in script
