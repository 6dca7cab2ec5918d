"""The embedded corpus: what is read, how it is split, and that nothing is imported for it."""

from __future__ import annotations

import ast

import pytest

import mpoe.data.documentation
from mpoe.data.documentation import (
    dotted_name,
    load_documentation,
    read_module,
    read_package,
    split_of,
    unit_hash,
)

SOURCE = '''
"""Module text."""
import missing_module_that_must_not_be_imported
class Pool:
    """Class text."""
    def get(self):
        """Method text."""
    @property
    def size(self):
        """Property text."""
class PoolError(ValueError):
    """Exception text."""
try:
    def build():
        """Function text."""
except ImportError:
    pass
add_newdoc("numpy._core.multiarray", "ndarray", [("fill", """a.fill(value)

    Fill it."""), ("size", """Number of elements.""")])
add_newdoc("numpy._core.umath", "sin", """Sine.""")
'''


def test_reads_every_kind_of_object_without_importing():
    records = list(read_module(ast.parse(SOURCE), "pool"))
    assert [(r.name, r.kind) for r in records] == [
        ("pool", "module"),
        ("pool.Pool", "class"),
        ("pool.Pool.get", "method"),
        ("pool.Pool.size", "property"),
        ("pool.PoolError", "exception"),
        ("pool.build", "function"),
        ("numpy.core.multiarray.ndarray.fill", "method"),
        ("numpy.core.multiarray.ndarray.size", "property"),
        ("numpy.core.umath.sin", "function"),
    ]
    assert records[6].text == "a.fill(value)\n\nFill it."


def test_unreadable_and_test_files_are_skipped(tmp_path):
    (tmp_path / "good.py").write_text('"""Good text."""')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test_good.py").write_text('"""A test."""')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "more.py").write_text('"""A test."""')
    assert [r.name for r in read_package(tmp_path, "pack")] == ["pack.good"]


def test_a_machine_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(mpoe.data.documentation.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"no documented Python source files found in {tmp_path}"):
        load_documentation.__wrapped__()


def test_corpus_is_large_deduplicated_and_of_all_kinds(documentation):
    records = documentation.records
    assert len(records) > 5000
    assert len({r.name for r in records}) == len(records)
    assert len({r.text for r in records}) == len(records)
    assert {r.kind for r in records} >= {"function", "class", "method", "exception", "module", "property", "topic"}
    assert {r.package for r in records} >= {"numpy", "asyncio", "email", "topics"}
    assert not any("test" in r.module.split(".") for r in records)
    shares = {s: len(documentation.split(s)) / len(records) for s in ("train", "validation", "test")}
    assert shares["train"] == pytest.approx(0.72, abs=0.03)
    assert shares["test"] == pytest.approx(0.20, abs=0.03)
    with pytest.raises(ValueError, match=r"split must be one of train.*'dev'"):
        documentation.split("dev")


EXPECTED_HASH = 0.9296015736222284
EXPECTED_SPLITS = ["train"] * 6 + ["test"] + ["train"] * 5


def test_split_is_fixed_by_package_and_object_alone(documentation):
    # Values written down once: a change of hash would move test items into the training split of shipped checkpoints.
    assert unit_hash("mpoe") == pytest.approx(EXPECTED_HASH, abs=1e-12)
    assert [split_of("email", f"object{i}") for i in range(12)] == EXPECTED_SPLITS
    for record in documentation.records[::50]:
        path = record.name[len(record.module) + 1 :]
        assert record.split == split_of(record.package, path or record.module)


def test_moved_modules_keep_their_split():
    assert dotted_name("numpy", ("_core", "fromnumeric.py")) == "numpy.core.fromnumeric"
    assert dotted_name("numpy", ("lib", "_function_base_impl.py")) == "numpy.lib.function_base"
    assert dotted_name("", ("_pydecimal.py",)) == "decimal"
    assert dotted_name("", ("email", "__init__.py")) == "email"
    old = next(read_module(ast.parse('def f():\n  "text"'), "pathlib"))
    new = next(read_module(ast.parse('def f():\n  "text"'), "pathlib.local"))
    assert old.split == new.split
