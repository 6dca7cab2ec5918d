"""English text that comes with every Python installation, its own documentation.

The docstrings of the standard library and of numpy are read from the source files with :mod:`ast`,
and the prose of ``pydoc_data.topics``; nothing is downloaded or stored. The corpus therefore
differs a little between Python and numpy versions, but an object falls into the same split
everywhere: the split is a hash of its top-level package and its name inside the module, so a module
that moves within its package (``pathlib`` -> ``pathlib._local``) takes nothing from the training
split into the test split.
"""

import ast
import functools
import gc
import hashlib
import inspect
import re
import runpy
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy

from mpoe.config.checks import check_choice
from mpoe.data.task import SPLITS

# Third-party packages, test code, graphical demos and packages that only some Python versions (or
# distributions) have.
SKIPPED_PARTS = {
    "site-packages",
    "dist-packages",
    "lib-dynload",
    "__pycache__",
    "pydoc_data",
    "ensurepip",
    "_pyinstaller",
    "test",
    "tests",
    "testing_tools",
    "conftest.py",
    "idlelib",
    "turtledemo",
    "lib2to3",
    "distutils",
    "__phello__",
    "__hello__.py",
    "this.py",
    "antigravity.py",
    "sitecustomize.py",
    "usercustomize.py",
}


_Function = ast.FunctionDef | ast.AsyncFunctionDef


class DocRecord(NamedTuple):
    """One documented object.

    ``name``: qualified name without private modules (``email.message.Message.get_payload``);
    ``text``: the docstring, unindented; ``split``: train, validation or test.
    """

    name: str
    text: str
    split: str


def load_documentation(split: str) -> tuple[DocRecord, ...]:
    """The documented objects of the train, validation or test split, by name, without repeated
    texts.

    The whole corpus is read once (about 2 seconds on one core) and kept for the life of the
    process.

    Raises:
        ValueError: ``split`` is not one of these.
        FileNotFoundError: the standard library's sources are not on this machine (for example a
            zipped installation).
    """
    check_choice("split", split, SPLITS)
    return tuple(record for record in _corpus() if record.split == split)


@functools.cache
def _corpus() -> tuple[DocRecord, ...]:
    """All splits. Syntax trees have millions of nodes and no cycles; looking for some among them
    takes longer than parsing."""
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        return _read_corpus()
    finally:
        if is_collecting:
            gc.enable()


def _read_corpus() -> tuple[DocRecord, ...]:
    library = Path(sysconfig.get_path("stdlib"))
    records = list(read_package(library, prefix=""))
    if not records:
        raise FileNotFoundError(f"no documented Python source files found in {library}")
    topics = library / "pydoc_data" / "topics.py"
    texts = runpy.run_path(str(topics))["topics"] if topics.is_file() else {}
    records += [_record("topics", name, inspect.cleandoc(text)) for name, text in texts.items()]
    records += read_package(Path(numpy.__file__).parent, prefix="numpy")
    kept: dict[str, DocRecord] = {}  # of equal words the first by name
    for record in sorted(records, key=lambda record: (record.name, record.text)):
        kept.setdefault(" ".join(re.findall(r"\w+", record.text.lower())), record)
    return tuple({record.name: record for record in reversed(kept.values())}.values())[::-1]


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone, on every machine and Python version."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def split_of(package: str, path: str) -> str:
    """Split of the object ``path`` (``Message.get_payload``) of the top-level package
    ``package``."""
    position = unit_hash(f"mpoe-documentation:{package}:{path}")
    return "test" if position < 0.20 else "validation" if position < 0.28 else "train"


def _record(module: str, path: str, text: str) -> DocRecord:
    """Record of the object ``path`` in ``module`` ("" = the module itself), put into its split."""
    split = split_of(module.split(".")[0], path or module)
    return DocRecord(f"{module}.{path}" if path else module, text.strip(), split)


def read_package(folder: Path, prefix: str) -> Iterator[DocRecord]:
    """Records of every source file under ``folder``; ``prefix`` is the dotted name of ``folder``
    itself ("" = none)."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if SKIPPED_PARTS.intersection(parts) or parts[-1].startswith("test_"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            # A file for another Python version, or unreadable: the corpus does without it.
            continue
        yield from read_module(tree, dotted_name(prefix, parts))


def dotted_name(prefix: str, parts: tuple[str, ...]) -> str:
    """Public-looking module name: ``("_core", "fromnumeric.py")`` under numpy is
    ``numpy.core.fromnumeric``."""
    names = [prefix] if prefix else []
    names += [part.removesuffix(".py") for part in parts if part != "__init__.py"]
    public = [name.strip("_").removesuffix("_impl") or name for name in names]
    # pure-Python twins of C modules
    if public and public[0] in ("pydecimal", "pyio", "pydatetime"):
        public[0] = public[0].removeprefix("py")
    return ".".join(public)


def read_module(node: ast.AST, module: str, path: str = "") -> Iterator[DocRecord]:
    """Records of a parsed module or of the definition ``path`` in it, of what is defined inside (in
    modules and classes, also under if/try), and of numpy's ``add_newdoc`` calls."""
    if isinstance(node, ast.Module | ast.ClassDef | _Function):
        text = ast.get_docstring(node)
        if text:
            yield _record(module, path, text)
    if isinstance(node, _Function):
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | _Function):
            yield from read_module(child, module, f"{path}.{child.name}" if path else child.name)
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from read_module(child, module, path)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from _added(child.value)


def _added(call: ast.Call) -> Iterator[DocRecord]:
    """Records of numpy's ``add_newdoc(module, name, doc)``: doc is a text, (attribute, text) or a
    list of these."""
    try:
        module, name, documented = map(ast.literal_eval, call.args[:3])
    except ValueError:  # other calls, or built from other values at import time
        return
    if "add_newdoc" not in ast.unparse(call.func) or not str(module).startswith("numpy"):
        return  # numpy.typing documents its aliases with another call of this name
    texts = [("", documented)] if isinstance(documented, str) else documented
    for attribute, text in [texts] if isinstance(texts, tuple) else texts:
        path = f"{name}.{attribute}".rstrip(".")
        yield _record(dotted_name("", tuple(module.split("."))), path, inspect.cleandoc(text))
