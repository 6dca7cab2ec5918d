"""English text that comes with every Python installation, its own documentation, and the embedded tasks made of it.

The docstrings of the standard library and of numpy are read from the source files with :mod:`ast`, and the prose of
``pydoc_data.topics``; nothing is downloaded or stored. The corpus therefore differs a little between Python and numpy
versions, but an object falls into the same split everywhere: the split is a hash of its top-level package and its name
inside the module, so a module that moves within its package (``pathlib`` -> ``pathlib._local``) takes nothing from the
training split into the test split.

``doc_module``: one sentence of documentation -> the family of modules it comes from, with the names masked.
``doc_lm``: language modelling. Training and held-out items never share an object nor a source text.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import itertools
import re
import runpy
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mpoe.config.checks import check_choice
from mpoe.data.task import SPLITS, Example, Task

TEST_SHARE = 0.20
VALIDATION_SHARE = 0.08

# Third-party packages, test code, graphical demos and packages that only some Python versions (or distributions) have.
SKIPPED_PARTS = frozenset(
    ("site-packages", "dist-packages", "lib-dynload", "__pycache__", "pydoc_data", "ensurepip", "_pyinstaller")
    + ("test", "tests", "testing_tools", "conftest.py", "idlelib", "turtledemo", "lib2to3", "distutils")
    + ("__phello__", "__hello__.py", "this.py", "antigravity.py", "sitecustomize.py", "usercustomize.py")
)


class DocRecord(NamedTuple):
    """One documented object.

    ``name``: qualified name (``email.message.Message.get_payload``); ``module``: the module's dotted name without
    private parts; ``text``: the docstring, unindented; ``split``: train, validation or test.
    """

    name: str
    module: str
    text: str
    split: str


def load_documentation(split: str) -> tuple[DocRecord, ...]:
    """The documented objects of the train, validation or test split, by name, without repeated texts.

    The whole corpus is read once (about 2 seconds on one core) and kept for the life of the process.

    Raises:
        ValueError: ``split`` is not one of these.
        FileNotFoundError: the standard library's sources are not on this machine (for example a zipped installation).
    """
    check_choice("split", split, SPLITS)
    return tuple(record for record in _corpus() if record.split == split)


@functools.cache
def _corpus() -> tuple[DocRecord, ...]:
    library = Path(sysconfig.get_path("stdlib"))
    records = list(read_package(library, prefix=""))
    if not records:
        raise FileNotFoundError(f"no documented Python source files found in {library}")
    topics = library / "pydoc_data" / "topics.py"
    texts = runpy.run_path(str(topics))["topics"] if topics.is_file() else {}
    records += [_record("topics", name, inspect.cleandoc(text)) for name, text in texts.items()]
    numpy = importlib.util.find_spec("numpy")  # without importing it
    if numpy is not None and numpy.origin:
        records += read_package(Path(numpy.origin).parent, prefix="numpy")
    kept: dict[str, DocRecord] = {}  # of equal words the first by name
    for record in sorted(records, key=lambda record: (record.name, record.text)):
        kept.setdefault(" ".join(re.findall(r"\w+", record.text.lower())), record)
    return tuple({record.name: record for record in reversed(kept.values())}.values())[::-1]


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone, on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") / 2.0**64


def split_of(package: str, path: str) -> str:
    """Split of the object ``path`` (``Message.get_payload``) of the top-level package ``package``."""
    position = unit_hash(f"mpoe-documentation:{package}:{path}")
    if position < TEST_SHARE:
        return "test"
    return "validation" if position < TEST_SHARE + VALIDATION_SHARE else "train"


def _record(module: str, path: str, text: str) -> DocRecord:
    """Record of the object ``path`` in ``module`` ("" = the module itself), put into its split."""
    name = f"{module}.{path}" if path else module
    return DocRecord(name, module, text.strip(), split_of(module.split(".")[0], path or module))


def read_package(folder: Path, prefix: str) -> Iterator[DocRecord]:
    """Records of every source file under ``folder``; ``prefix`` is the dotted name of ``folder`` itself ("" = none)."""
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
    """Public-looking module name: ``("_core", "fromnumeric.py")`` under numpy is ``numpy.core.fromnumeric``."""
    names = [prefix] if prefix else []
    names += [part.removesuffix(".py") for part in parts if part != "__init__.py"]
    public = [name.strip("_").removesuffix("_impl") or name for name in names]
    if public and public[0] in {"pydecimal", "pyio", "pydatetime"}:  # pure-Python twins of C modules
        public[0] = public[0].removeprefix("py")
    return ".".join(public)


def read_module(node: ast.AST, module: str, path: str = "") -> Iterator[DocRecord]:
    """Records of a parsed module or of the definition ``path`` in it, of what is defined inside (in modules and
    classes, also under if/try), and of numpy's ``add_newdoc`` calls."""
    if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        text = ast.get_docstring(node)
        if text:
            yield _record(module, path, text)
    for child in [] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from read_module(child, module, f"{path}.{child.name}" if path else child.name)
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from read_module(child, module, path)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from _added(child.value)


def _added(call: ast.Call) -> Iterator[DocRecord]:
    """Records of numpy's ``add_newdoc(module, name, doc)``: doc is a text, (attribute, text) or a list of these."""
    try:
        module, name, documented = map(ast.literal_eval, call.args[:3])
    except ValueError:  # other calls, or built from other values at import time
        return
    if "add_newdoc" not in ast.unparse(call.func) or not str(module).startswith("numpy"):
        return  # numpy.typing documents its aliases with another call of this name
    texts = [("", documented)] if isinstance(documented, str) else documented
    for attribute, text in [texts] if isinstance(texts, tuple) else texts:
        path = f"{name}.{attribute}" if attribute else name
        yield _record(dotted_name("", tuple(module.split("."))), path, inspect.cleandoc(text))


# ------------------------------------------------------------------ doc_module

MASK = "[it]"
MAX_SENTENCES = 3  # per object
MAX_PER_FAMILY = {"train": 1200, "validation": 120, "test": 260}
# family -> dotted module prefixes. Grouped by subject, so that each has some hundred sentences on any Python >= 3.11.
FAMILIES: dict[str, tuple[str, ...]] = {
    "array": ("numpy.core", "numpy.lib", "numpy.matrixlib", "numpy.ma"),
    "number": ("numpy.polynomial", "numpy.linalg", "numpy.fft", "statistics", "fractions", "decimal", "random"),
    "window": ("tkinter", "turtle", "curses"),
    "async": ("asyncio", "selectors", "socketserver", "socket", "ssl"),
    "mail": ("email", "mailbox", "smtplib", "imaplib", "poplib"),
    "web": ("http", "urllib", "wsgiref", "xmlrpc", "html", "ftplib", "ipaddress"),
    "import": ("importlib", "pkgutil", "zipimport", "runpy", "modulefinder"),
    "log": ("logging", "warnings", "traceback", "argparse", "optparse", "configparser"),
    "test": ("unittest", "doctest", "pdb", "bdb", "numpy.testing"),
    "process": ("multiprocessing", "threading", "concurrent", "queue", "subprocess", "sched"),
    "file": ("tarfile", "zipfile", "shutil", "pathlib", "tempfile", "gzip", "bz2", "lzma", "os", "io"),
    "code": ("inspect", "ast", "typing", "dis", "tokenize", "symtable", "enum", "dataclasses", "pydoc", "xml"),
}
# Words that would reveal the family directly.
TELLING = frozenset(
    ("numpy", "np", "tk", "tkinter", "tcl", "asyncio", "importlib", "unittest", "doctest", "multiprocessing", "logging")
)


def family_of(module: str) -> str | None:
    """Family of a module, None outside all families."""
    return next((name for name, own in FAMILIES.items() if any(f"{module}.".startswith(f"{p}.") for p in own)), None)


def prose_sentences(text: str) -> list[str]:
    """Plain sentences of a docstring: no doctests, tables, section titles, parameter lists or code blocks.

    The first line of a docstring counts as a sentence whether or not it ends in a full stop.
    """
    sentences: list[str] = []
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text)):
        lines = paragraph.split("\n")
        if ">>>" in paragraph or re.search(r"^\s*[-=~*+|]{3,}", paragraph, re.MULTILINE):
            continue
        if number and (lines[0].startswith((" ", "\t", ".. ")) or len(lines) > 12):
            continue
        flat = re.sub(r":\w+:`([^`]*)`", r"\1", " ".join(line.strip() for line in lines))
        flat = re.sub(r"\s+", " ", flat.replace("`", "")).strip()
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", flat):
            if 3 <= len(re.findall(r"[A-Za-z]{2,}", sentence)) <= 60 and len(sentence) <= 400:
                sentences.append(sentence)
    return sentences


def mask_names(text: str, names: set[str]) -> str:
    """``text`` with every whole-word occurrence of ``names`` (any case, also inside dotted paths) replaced by [it]."""
    hidden = {name.lower() for name in names if len(name) > 1}
    masked = re.sub(r"\w+", lambda word: MASK if word[0].lower() in hidden else word[0], text)
    return re.sub(rf"{re.escape(MASK)}(?:\.{re.escape(MASK)})+", MASK, masked)


def module_items(record: DocRecord) -> Iterator[Example]:
    """doc_module items of one object: its first sentences, one item each."""
    family = family_of(record.module)
    if family is not None:
        parts = record.name.split(".")
        hidden = {*parts, *(part.strip("_") for part in parts), *TELLING, family}
        for sentence in prose_sentences(record.text)[:MAX_SENTENCES]:
            yield Example(f"subject of: {mask_names(sentence, hidden)}", family)


@functools.cache
def _modules() -> dict[str, list[Example]]:
    """All items of doc_module by split, in an order that depends only on the texts.

    A source text occurs once, in training if it can; large families are cut to a limit, so that always answering the
    most common one scores low.
    """
    found: dict[str, tuple[str, Example]] = {}
    for split in SPLITS:
        for example in itertools.chain.from_iterable(map(module_items, load_documentation(split))):
            found.setdefault(example.source.lower(), (split, example))
    items: dict[str, list[Example]] = {split: [] for split in SPLITS}
    counts: Counter[tuple[str, str]] = Counter()
    for split, example in sorted(found.values(), key=lambda item: unit_hash(f"order:{item[1].source}")):
        counts[split, example.target] += 1
        if counts[split, example.target] <= MAX_PER_FAMILY[split]:
            items[split].append(example)
    return items


EMBEDDED_TASKS = (
    Task(  # of 12 families
        name="doc_module",
        rows=lambda split: _modules()[split],
        labels=tuple(FAMILIES),
        metrics=("accuracy", "macro_f1"),
        max_source_length=64,
        max_target_length=4,
    ),
    Task(  # every docstring, preceded by the name it documents
        name="doc_lm",
        rows=lambda split: (Example(f"{r.name}\n{r.text}\n") for r in load_documentation(split)),
        kind="language_modeling",
        metrics=("perplexity",),
        max_source_length=128,
    ),
)
