"""Runs tests and lists the `raise` statements of the packages that none of them reached.

    python tools/untested_refusals.py tests/kernels tests/layers tests/models tests/training tests/data tests/cli

Takes pytest's arguments. Statements are marked as the packages are imported, so tests run at their usual speed; what
tests do in other processes is not seen.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mpoe", "mpoe_kernels")
# Of the language, not of a user's mistake.
_PROTOCOL = ("AttributeError", "NotImplementedError", "KeyboardInterrupt", "SystemExit", "StopIteration")


def sites_of(path: Path) -> list[int]:
    """Lines of the statements that raise a new exception."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise))
    return sorted(node.lineno for node in nodes if _is_refusal(node))


def _is_refusal(node: ast.Raise) -> bool:
    made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return node.exc is not None and getattr(made, "id", "") not in _PROTOCOL


class _Marks(ast.NodeTransformer):
    def __init__(self, path: str) -> None:
        self.path = path

    def visit_Raise(self, node: ast.Raise) -> list[ast.stmt]:
        call = ast.parse(f"__reached__({self.path!r}, {node.lineno})").body[0]
        return [ast.copy_location(call, node), node]


class _Loader(SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, **_: Any) -> Any:  # type: ignore[override]
        tree = ast.fix_missing_locations(_Marks(str(path)).visit(ast.parse(data)))
        return compile(tree, path, "exec", dont_inherit=True)

    def path_stats(self, path: Any) -> Any:
        raise OSError("marked code is not cached")


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def main(words: Sequence[str]) -> int:
    import pytest

    reached: set[tuple[str, int]] = set()
    builtins.__reached__ = lambda path, line: reached.add((path, line))  # type: ignore[attr-defined]
    sys.meta_path.insert(0, _Finder())
    sys.path.insert(0, str(ROOT))
    status = pytest.main(["-q", "-p", "no:cacheprovider", *words])
    every = [
        (str(path), line)
        for name in PACKAGES
        for path in sorted((ROOT / name).rglob("*.py"))
        for line in sites_of(path)
    ]
    missed = [site for site in every if site not in reached]
    for path, line in missed:
        print(f"{Path(path).relative_to(ROOT)}:{line}: {Path(path).read_text().splitlines()[line - 1].strip()}")
    print(f"{len(every) - len(missed)} of {len(every)} reached")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
