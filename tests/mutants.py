"""Change the package in one place at a time, and list the changes that no test sees.

    .venv-test/bin/python tests/mutants.py --tests tests/runtime tests/test_modeling.py -- runtime/cache.py modeling.py
    .venv-test/bin/python tests/mutants.py --tests tests/runtime -- runtime/rows.py:37,122    # these lines alone

A child of one pytest session runs all tests once, to learn the lines that each of them reaches. Then each mutant has a
child of its own, in which the functions of a module get other code: the tests that reach the changed line run, the
quickest first, until one fails. A child needs no imports and no collection, so that most mutants take half a second.

What a module runs when it is imported (constants, defaults, decorators) is not changed. It needs Python 3.11 and
`os.fork`.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import random
import signal
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

import coverage
import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "optimum_lfm2"
LIMIT = 10  # seconds of processor time that a test may take beyond ten times what it takes otherwise

OPPOSITES = {
    ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn, ast.Lt: ast.GtE, ast.LtE: ast.Gt,
    ast.Add: ast.Sub, ast.Mult: ast.Div, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd,
}  # fmt: skip
OPPOSITES |= {other: one for one, other in OPPOSITES.items()}
NEIGHBOURS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


@dataclass(frozen=True)
class Mutant:
    """One change: the node is looked up by its number in `ast.walk`, which is the same for every parse of the text."""

    file: Path
    node: int
    new: ast.AST
    lines: range
    what: str


def changes(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in place of a node."""
    always, never = ast.Constant(True), ast.Constant(False)
    match node:
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            for known in (always, never):
                # What a `:=` binds stays bound.
                yield _with(node, test=ast.BoolOp(ast.And() if known is never else ast.Or(), [test, known]))
        case ast.Compare(ops=[op]):
            yield from (_with(node, ops=[table[type(op)]()]) for table in (OPPOSITES, NEIGHBOURS) if type(op) in table)
        case ast.BoolOp(values=values):
            for i in range(len(values)):
                rest = [*values[:i], *values[i + 1 :]]
                yield rest[0] if len(rest) == 1 else _with(node, values=rest)
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OPPOSITES:
            yield _with(node, op=OPPOSITES[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant) or value.value is not None:
            yield ast.Return(ast.Constant(None))
        case ast.For():
            yield _with(node, iter=ast.List([], ast.Load()))
        case ast.comprehension(ifs=[_, *_]):
            yield _with(node, ifs=[])
        case ast.ExceptHandler(type=ast.expr()):
            yield _with(node, type=ast.Name("ZeroDivisionError", ast.Load()))
        case ast.Raise() if not isinstance(parent, ast.If):  # else the `if` is changed
            yield ast.Pass()
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
        case ast.Expr(value=value) if not isinstance(value, (ast.Constant, ast.Yield, ast.YieldFrom)):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    return ast.copy_location(type(node)(**{**dict(ast.iter_fields(node)), **fields}), node)


def mutants(file: Path) -> Iterator[Mutant]:
    """Yield every mutant of a module that differs in a function, without those of messages and annotations."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for number, node in enumerate(ast.walk(tree)):
        above = [node]
        while above[-1] in parents:
            above.append(parents[above[-1]])
        function = next((one for one in above[1:] if isinstance(one, (ast.FunctionDef, ast.Lambda))), None)
        in_body = isinstance(function, ast.Lambda) or (function and above[above.index(function) - 1] in function.body)
        if not in_body or any(isinstance(one, (ast.Raise, ast.JoinedStr, ast.AnnAssign)) for one in above[1:]):
            continue
        statement = next(one for one in above if isinstance(one, (ast.stmt, ast.ExceptHandler)))
        last = next((value for name in ("test", "iter", "type") if (value := getattr(node, name, None))), node)
        lines = range(statement.lineno, max(getattr(last, "end_lineno", 0), statement.lineno) + 1)
        for new in changes(node, above[1]):
            yield Mutant(file, number, new, lines, f"{_text(node)} -> {_text(new)}")


def _text(node: ast.AST) -> str:
    body = {"body": [ast.Pass()], "orelse": []} if isinstance(node, (ast.If, ast.For, ast.While)) else {}
    return " ".join(ast.unparse(ast.fix_missing_locations(_with(node, **body))).split())[:70]


def codes(code: CodeType) -> dict[str, CodeType]:
    """Return the code of the functions and methods of a module, by qualified name."""
    found: dict[str, CodeType] = {}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= {inner.co_qualname: inner} | (codes(inner) if "<locals>" not in inner.co_qualname else {})
    return found


def apply(mutant: Mutant, functions: Iterable[FunctionType]) -> None:
    """Give the functions of the mutant's module its code."""
    tree = ast.parse(mutant.file.read_text(encoding="utf-8"))
    before = codes(compile(tree, str(mutant.file), "exec"))
    target = list(ast.walk(tree))[mutant.node]
    for node in ast.walk(tree):
        for name, value in ast.iter_fields(node):
            if value is target:
                setattr(node, name, mutant.new)
            elif isinstance(value, list):
                setattr(node, name, [mutant.new if one is target else one for one in value])
    after = codes(compile(ast.fix_missing_locations(tree), str(mutant.file), "exec"))
    for function in functions:
        name = function.__code__.co_qualname
        if function.__code__.co_filename == str(mutant.file) and before.get(name) != after.get(name):
            function.__code__ = after[name]


class Mutants:
    """A plugin of pytest that runs mutants in place of the tests that were collected."""

    def __init__(self, modules: list[str], workers: int, share: float, place: Path) -> None:
        self.workers, self.place = workers, place
        lines = {PACKAGE / name: listed for name, _, listed in (module.partition(":") for module in modules)}
        self.files = list(lines)
        found = [
            mutant
            for file, listed in lines.items()
            for mutant in mutants(file)
            if not listed or str(mutant.lines.start) in listed.split(",")
        ]
        self.mutants = random.Random(0).sample(found, round(share * len(found)))
        self.times: dict[str, float] = {}
        self.killers: Counter[str] = Counter()
        self.limits = False

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.functions = [
            one
            for one in gc.get_objects()
            if type(one) is FunctionType and (one.__module__ or "").startswith("optimum_lfm2")
        ]
        gc.freeze()
        self._child(session, "tests", self._measure)
        if os.wait()[1] != 0:
            raise pytest.UsageError("A test fails without any mutant.")
        self.times, reached = json.loads((self.place / "tests").read_text())
        running: dict[int, tuple[Mutant, str]] = {}
        survivors, unreached = [], []

        def wait() -> None:
            child, status = os.wait()
            mutant, name = running.pop(child)
            if status == 0:
                survivors.append(mutant)
            elif (killer := self.place / name).is_file():
                self.killers[killer.read_text()] += 1

        for number, mutant in enumerate(self.mutants):
            tests = {test for line in mutant.lines for test in reached.get(str(mutant.file), {}).get(str(line), ())}
            if not tests:
                unreached.append(mutant)
                continue
            if len(running) == self.workers:
                wait()
            # Those that have killed most come first, then the quickest.
            order = sorted(tests, key=lambda test: (-self.killers[test], self.times[test]))
            running[self._child(session, str(number), self._try, mutant, order)] = (mutant, str(number))
        while running:
            wait()
        for what, which in (("no test reaches", unreached), ("survived", survivors)):
            for mutant in sorted(which, key=lambda one: (one.file, one.lines.start)):
                print(f"{mutant.file.relative_to(ROOT)}:{mutant.lines.start}: {what}: {mutant.what}")
        killed = len(self.mutants) - len(survivors) - len(unreached)
        print(f"{killed} of {len(self.mutants)} mutants were killed")
        return True

    def _child(self, session: pytest.Session, name: str, work, *args: object) -> int:
        if child := os.fork():
            return child
        try:
            session.config._tmp_path_factory._basetemp = Path(tempfile.mkdtemp(dir=self.place))
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            work(session, self.place / name, *args)
        except BaseException:  # of a mutant, as any failure
            os._exit(2)
        os._exit(0)

    def _run(self, items: list[pytest.Item], before) -> None:
        for item, following in zip(items, [*items[1:], None], strict=True):
            before(item)
            start = time.process_time()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self.times[item.nodeid] = time.process_time() - start

    def _measure(self, session: pytest.Session, out: Path) -> None:
        watch = coverage.Coverage(data_file=None, include=[str(file) for file in self.files])
        watch.start()
        self._run(session.items, lambda item: watch.switch_context(item.nodeid))
        watch.stop()
        data = watch.get_data()
        out.write_text(
            json.dumps([self.times, {file: data.contexts_by_lineno(file) for file in data.measured_files()}])
        )

    def _try(self, session: pytest.Session, out: Path, mutant: Mutant, tests: list[str]) -> None:
        self.limits = True
        apply(mutant, self.functions)
        items = {item.nodeid: item for item in session.items}
        self.killer = out

        def limit(item: pytest.Item) -> None:
            signal.setitimer(signal.ITIMER_PROF, LIMIT + 10 * self.times[item.nodeid])  # it ends the child

        self._run([items[test] for test in tests if test in items], limit)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            if self.limits:
                self.killer.write_text(report.nodeid)
            os._exit(1)


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="+", help="such as runtime/cache.py, or runtime/cache.py:50,61 for lines")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="files and folders of tests")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants, drawn with a seed")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PYTEST_XDIST_WORKER"] = "gw0"  # so that all children share the exports that `made_once` makes
    with tempfile.TemporaryDirectory() as folder:
        plugin = Mutants(args.modules, args.workers, args.share, Path(folder))
        options = ["-q", "--capture=no", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
        pytest.main([*args.tests, *options], plugins=[plugin])


if __name__ == "__main__":
    main()
