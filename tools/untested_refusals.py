"""Fails a test run that leaves a `raise` statement of the packages unreached, and lists such
statements.

    PYTHONPATH=tools PYTEST_ADDOPTS="-p untested_refusals" python -m pytest -n 2

A pytest plugin: it marks the statements when the packages are imported, so tests run at their usual
speed. Statements count if they are reached in pytest's own process, in those of pytest-xdist or in
those that tests start; random inputs do not count, because nobody wrote down which error they
should get. A statement that such a run cannot reach says so itself: ``# reached only ...`` on its
first line, with the reason.
"""

import ast
import builtins
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mpoe", "mpoe_kernels")
EXCUSE = "# reached only "
RANDOM = "tests/faults/test_fuzz.py::test_inputs"
# Part of the language's protocols, not about a user's mistake.
_PROTOCOL = (
    "AttributeError",
    "NotImplementedError",
    "KeyboardInterrupt",
    "SystemExit",
    "StopIteration",
)
_FOLDER = "MPOE_REACHED"  # names the folder where every process writes what it reached
_reached: set[str] = set()


def _is_refusal(node: ast.AST) -> bool:
    """Whether a statement raises a new exception about a user's mistake."""
    if not isinstance(node, ast.Raise) or node.exc is None:
        return False
    made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return getattr(made, "id", "") not in _PROTOCOL


def refusals(path: Path) -> Iterator[tuple[str, str]]:
    """``path:line`` and the first line of every refusal in a file."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in filter(_is_refusal, ast.walk(ast.parse(text))):
        yield f"{path}:{node.lineno}", lines[node.lineno - 1].strip()


class _Marks(ast.NodeTransformer):
    def __init__(self, path: str) -> None:
        self.path = path

    def visit_Raise(self, node: ast.Raise) -> list[ast.stmt]:
        call = ast.parse(f"__reached__({f'{self.path}:{node.lineno}'!r})").body[0]
        return [ast.copy_location(call, node), node]


class _Loader(SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, **_: Any) -> Any:  # type: ignore[override]
        tree = ast.fix_missing_locations(_Marks(str(path)).visit(ast.parse(data)))
        return compile(tree, path, "exec", dont_inherit=True)

    def path_stats(self, path: Any) -> Any:
        raise OSError("marked code is not cached")


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: Any = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in PACKAGES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _note(site: str) -> None:
    if not os.environ.get("PYTEST_CURRENT_TEST", "").startswith(RANDOM):
        _reached.add(site)


class _Report:
    """The final report, made by the process that was started first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        reached = {
            site
            for file in self.folder.iterdir()
            for site in file.read_text(encoding="utf-8").splitlines()
        }
        paths = (path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")))
        every = [refusal for path in paths for refusal in refusals(path)]
        missed = [(site, line) for site, line in every if site not in reached]
        untested = [
            f"{Path(site).relative_to(ROOT)}: {line}" for site, line in missed if EXCUSE not in line
        ]
        beyond = len(missed) - len(untested)
        summary = f"{len(every)} refusals, {beyond} beyond this run, {len(untested)} untested"
        self.lines = [*untested, summary]
        if untested and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("refusals that no test reached")
        for line in self.lines:
            terminalreporter.line(line)


def pytest_configure(config: pytest.Config) -> None:
    if _FOLDER not in os.environ:
        folder = tempfile.TemporaryDirectory()
        os.environ[_FOLDER] = folder.name
        config.pluginmanager.register(_Report(Path(folder.name)))
        config.add_cleanup(folder.cleanup)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    (Path(os.environ[_FOLDER]) / str(os.getpid())).write_text("\n".join(_reached), encoding="utf-8")


# Not in a hook: other plugins may import the packages before any hook is called.
builtins.__reached__ = _note  # type: ignore[attr-defined]
sys.meta_path.insert(0, _Finder())
