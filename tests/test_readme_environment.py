"""Optimum's public imports and README's snippet, in fresh interpreters that hold only what README installs.

An environment made anew would take minutes. Instead, the distributions that README names, and those that they require,
are linked from the running environment into a folder, and Python starts with that folder alone (`-S` leaves the running
environment's own packages out). So pytest and whatever else the tests need cannot be imported there.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

import optimum.exporters.onnx
import optimum.onnxruntime
import pytest
from packaging.requirements import Requirement
from pages import ROOT, read, snippets

from optimum_lfm2.compat import TRANSFORMERS_5


# In the order in which README's two ways are written: by pip's own choice, and on transformers 5.
INSTALL = re.search(r"^## Install$(.*?)^## ", read("README.md"), flags=re.MULTILINE | re.DOTALL).group(1)
INSTALLED = re.findall(r"^pip install (.*?)(?: +#.*)?$", INSTALL, flags=re.MULTILINE)
OURS = "optimum-lfm2"


def required(roots: Iterable[str]) -> set[str]:
    """The names of the distributions and of all that they require."""
    names, todo = set(), [Requirement(root) for root in roots]
    seen = set()
    while todo:
        requirement = todo.pop()
        key = (requirement.name.lower().replace("_", "-"), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        names.add(key[0])
        extras = key[1] or {""}
        for line in distribution(requirement.name).requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return names


def readme_installs() -> set[str]:
    whole, with_requirements, without = (line.replace('"', "").split() for line in INSTALLED)
    if not TRANSFORMERS_5:
        return required(entry.replace(".[", f"{OURS}[") for entry in whole)
    alone = {entry.split("==")[0].replace(".", OURS) for entry in without if entry != "--no-deps"}
    return required(with_requirements) | {name.lower() for name in alone}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> str:
    """The value of PYTHONPATH that holds what README installs."""
    theirs, ours = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("ours")
    for name in readme_installs() - {OURS}:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files} - {"..", "__pycache__"}:
            if not (theirs / top).exists():
                (theirs / top).symlink_to(installed.locate_file(top))
    for folder in ("optimum", "optimum_lfm2"):
        (ours / folder).symlink_to(ROOT / folder)
    return os.pathsep.join(map(str, (theirs, ours)))


def python(packages: str, code: str, folder: Path = ROOT) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    environment |= {"PYTHONPATH": packages, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_environment_holds_no_more_than_readme_says(packages):
    found = python(
        packages,
        "from importlib.util import find_spec\n"
        "print(*[name for name in ('transformers', 'optimum', 'pytest', 'coverage', 'setuptools', 'pip', 'diffusers')"
        " if find_spec(name)])",
    ).split()
    assert found[:2] == ["transformers", "optimum"]
    assert not {"pytest", "coverage", "pip", "diffusers"} & set(found)


# Names that a user imports, in groups that one module defines.
PUBLIC = [
    *(
        [f"from optimum.onnxruntime import {name}" for name in names]
        for names in optimum.onnxruntime._import_structure.values()
    ),
    *(
        [f"from optimum.exporters.onnx import {name}" for name in names]
        for names in optimum.exporters.onnx._import_structure.values()
    ),
    ["from optimum.pipelines import pipeline"],
    ["from optimum.exporters.tasks import TasksManager"],
]
# Each program in a child of an interpreter that has imported one thing alone: as in a fresh one, and at once.
IN_CHILDREN = """
import json, os, sys
{first}
for program in {programs!r}:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            exec(program, {{}})
        except BaseException as error:
            print(json.dumps([program, repr(error)]), flush=True)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_each_public_name_is_imported_first(packages):
    """Or right after those of its module, which imports nothing more."""
    assert sum(map(len, PUBLIC)) > 60
    programs = ["\n".join(statements) for statements in PUBLIC]
    assert python(packages, IN_CHILDREN.format(first="import optimum_lfm2", programs=programs)) == ""


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (
            "import optimum_lfm2",
            ["", "from optimum.onnxruntime import ORTModelForCausalLM; import transformers.pipelines"],
        ),
        (
            "import transformers",
            [
                "import transformers.pipelines, optimum_lfm2",
                "from transformers import AutoModelForCausalLM, AutoProcessor; import optimum_lfm2",
            ],
        ),
    ],
)
def test_pipelines_whatever_was_imported_before(first, then, packages, exported, tmp_path):
    shutil.copytree(exported("trained"), tmp_path / "lfm2_onnx")
    code = """
from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTModelForVision2Seq, pipeline
import optimum.pipelines
for make, options in ((pipeline, {}), (optimum.pipelines.pipeline, {"accelerator": "ort"})):
    write = make("text-generation", model="lfm2_onnx", **options)
    print(type(write.model).__name__)
    print(write("Once upon a time", max_new_tokens=8, do_sample=False)[0]["generated_text"])
"""
    said = python(packages, IN_CHILDREN.format(first=first, programs=[before + code for before in then]), tmp_path)
    name, text, *others = said.splitlines()
    assert name == "ORTLfm2ForCausalLM"
    assert others == [name, text] * (2 * len(then) - 1)
    assert len(text.split()) > 8


def test_readme_chats(packages, exported, tmp_path):
    """Its other snippets need more than its first lines install: test_docs.py and test_processor.py run them."""
    (tmp_path / "lfm2_onnx").symlink_to(exported("trained", variant="q4"))
    chat, *_ = snippets("README.md")
    assert python(packages, chat, tmp_path) == "The silver key is next to the well. Ben put it there.\n"


# Imports that Optimum makes on a condition which does not hold here.
CONDITIONAL = {
    "SpecialTokensMixin": "for type checkers alone",
    "generation_utils": "transformers < 4.25",
    "CLIPSdpaAttention": "transformers < 4.48",
    "CLIPFeatureExtractor": "diffusers is installed",
    "TFPreTrainedModel": "TensorFlow is installed",
}


def imports_of(package: Path) -> Iterable[tuple[str, str]]:
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("transformers", "requests"):
                yield from ((str(node.module), alias.name) for alias in node.names)


def test_all_that_optimum_imports_is_there():
    """Not only what the public names take: a function's own imports too."""
    missing = {}
    for module, name in sorted(set(imports_of(Path(optimum.onnxruntime.__file__).parent.parent))):
        if module.rpartition(".")[2] in CONDITIONAL or name in CONDITIONAL:
            continue
        try:
            if not hasattr(importlib.import_module(module), name):
                importlib.import_module(f"{module}.{name}")
        except ImportError as error:
            missing[f"{module}.{name}"] = str(error)
    assert not missing
