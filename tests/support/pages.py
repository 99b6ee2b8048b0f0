"""The pages of this repository: their links, their anchors, and the snippets in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from string import Template


ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SHELL = ("", "bash")
PLACES = ("*.md", "docs/*.md", "demo/*.md", "examples/*/*.md", ".github/**/*.md")


def pages() -> list[str]:
    """The Markdown files of this repository, by their paths from the top."""
    found = [path for where in PLACES for path in ROOT.glob(where)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def snippets(page: str, language: str = "python") -> list[str]:
    return [code for name, code in FENCE.findall(read(page)) if name == language]


def commands(page: str) -> Iterator[list[str]]:
    """Yield the words of each shell command that a page shows, without comments, variables and `time`."""
    text = "\n".join(code for name, code in FENCE.findall(read(page)) if name in SHELL)
    text = re.sub(r'^python -c "\n.*?"$', "", text.replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
    variables: dict[str, str] = {}
    for line in text.splitlines():
        words = [Template(word).safe_substitute(variables) for word in shlex.split(line, comments=True)]
        while words and (re.match(r"\w+=", words[0]) or words[0] in ("/usr/bin/time", "-v")):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words:
            yield words


def links(page: str) -> Iterator[tuple[str, str]]:
    """Yield the path from the page and the anchor of each link to a file of the repository. Either may be empty."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", read(page)))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", read(page)), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
        repeats = sum(1 for other in found if re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other))
        found.add(f"{anchor}-{repeats}" if repeats else anchor)
    return found
