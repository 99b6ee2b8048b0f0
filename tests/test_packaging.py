"""The installed package: the wheel's files, the start time of `optimum-cli`, failures that harm no other command."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import optimum_lfm2


ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "transformers", "onnx", "onnxruntime", "numpy", "optimum_lfm2"]


def is_installed() -> bool:
    try:
        return bool(importlib.metadata.version("optimum-lfm2"))
    except importlib.metadata.PackageNotFoundError:
        return False


def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path or [ROOT]))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=path[0] if path else ROOT)


def test_no_init_in_the_namespace():
    """An `__init__.py` there would hide all of Optimum."""
    assert (ROOT / "optimum" / "commands" / "register" / "register_lfm2.py").is_file()
    assert not list((ROOT / "optimum").rglob("__init__.py"))


@pytest.mark.slow
def test_wheel(tmp_path):
    for folder in ("optimum", "optimum_lfm2"):
        shutil.copytree(ROOT / folder, tmp_path / "source" / folder)
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, tmp_path / "source" / file)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "."]
    subprocess.run([*build, "-w", str(tmp_path)], cwd=tmp_path / "source", check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for folder in ("optimum", "optimum_lfm2") for path in (ROOT / folder).rglob("*.*")]
    sources = {str(path.relative_to(ROOT)) for path in files if path.suffix in (".py", ".typed", ".jinja")}
    assert len([name for name in sources if not name.endswith(".py")]) >= 5
    assert sources <= names
    assert "optimum_lfm2/py.typed" in names
    assert wheel.name.split("-")[1] == optimum_lfm2.__version__
    assert not [name for name in names if name.startswith("optimum/") and name.endswith("__init__.py")]
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = run("import sys; sys.argv = ['optimum-cli', 'export', '--help']; " + CLI, tmp_path / "site")
    assert done.returncode == 0
    assert "onnx" in done.stdout
    assert WRAPPED in run(SHOW_RUN, tmp_path / "site").stdout


CLI = "from optimum.commands.optimum_cli import main; main()"
WRAPPED = "optimum.commands.lfm2.export_onnx"
SHOW_RUN = """
from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands
load_optimum_namespace_cli_commands()
from optimum.commands.export.onnx import ONNXExportCommand
print(ONNXExportCommand.run.__globals__["__name__"])
"""


@pytest.mark.skipif(not is_installed(), reason="optimum-lfm2 is not installed, only on the path")
def test_the_installed_package_reaches_the_command_line(tmp_path):
    """The same holds for an editable install, where a finder of setuptools joins the parts of the namespace."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", SHOW_RUN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == WRAPPED


def test_the_command_is_wrapped_once():
    done = run(
        SHOW_RUN + "\nload_optimum_namespace_cli_commands()\nprint(ONNXExportCommand.run.__wrapped__.__module__)"
    )
    assert done.stdout.split() == [WRAPPED, "optimum.commands.export.onnx"]


WRAPPED_BY_ANOTHER = """
import functools, sys
from optimum.commands.export import onnx
original = onnx.ONNXExportCommand.run
@functools.wraps(original)
def run(self):
    original(self)
onnx.ONNXExportCommand.run = run
"""


def test_another_plugins_wrapper_leaves_ours_on():
    """It may come first, with `functools.wraps`."""
    done = run(WRAPPED_BY_ANOTHER + SHOW_RUN)
    assert done.stdout.split() == [WRAPPED]


START_TWICE = """
import sys
from optimum.commands.optimum_cli import main
for words in (["export", "lfm2"], ["lfm2", "evaluate"], ["export", "lfm2"]):
    sys.argv = ["optimum-cli", *words, "--help"]
    try:
        main()
    except SystemExit as end:
        print("ended", end.code)
"""


@pytest.mark.parametrize("copies", [1, 2])
def test_the_command_line_starts_again_in_one_process(copies, tmp_path):
    """Also where two folders of the namespace hold the plugin: each start then reads the commands twice."""
    folders = [tmp_path / str(number) for number in range(copies)]
    for folder in folders:
        shutil.copytree(ROOT / "optimum", folder / "optimum")
    done = run(START_TWICE, *folders)
    assert done.stdout.count("ended 0") == 3, done.stderr


def test_the_commands_know_the_types_of_the_package():
    from optimum.commands.lfm2.model_types import MODEL_TYPES
    from optimum_lfm2 import families

    assert sorted(MODEL_TYPES) == sorted(families.MODEL_TYPES)


def test_start_imports_nothing_heavy():
    code = """
import sys, time
from optimum.commands import optimum_cli
from optimum.commands.register import register_export, register_onnxruntime
before, started = set(sys.modules), time.perf_counter()
optimum_cli.load_optimum_namespace_cli_commands()
print(time.perf_counter() - started)
print(*(set(sys.modules) - before))
"""
    seconds, *modules = run(code).stdout.split()
    assert not {name.split(".")[0] for name in modules} & set(HEAVY)
    assert "optimum.commands.register.register_lfm2" in modules
    assert float(seconds) < 0.03 * 10  # it took 2 ms when measured; a busy machine may need longer


@pytest.fixture
def broken(tmp_path) -> Path:
    """A copy of the plugin with a defect in one of its light modules."""
    shutil.copytree(ROOT / "optimum", tmp_path / "optimum")
    path = tmp_path / "optimum" / "commands" / "lfm2" / "export_onnx.py"
    path.write_text("raise RuntimeError('a defect')\n")
    return tmp_path


def test_a_failure_of_the_plugin_is_one_line(broken):
    done = run("import sys; sys.argv = ['optimum-cli', 'export', '--help']; " + CLI, broken)
    assert done.returncode == 0
    assert "onnx" in done.stdout
    assert done.stderr.count("\n") == 1
    assert "a defect" in done.stderr
