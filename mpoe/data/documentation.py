"""English text that comes with every Python installation, its own documentation, and the embedded tasks made of it.

The docstrings of the standard library and of numpy, and the prose of ``pydoc_data.topics``, are read from the source
files with :mod:`ast`; nothing is imported, downloaded or stored. The corpus therefore differs a little between Python
and numpy versions, but an object falls into the same split everywhere: the split is a hash of its top-level package
and its name inside the module, so a module that moves within its package (``pathlib`` -> ``pathlib._local``) takes
nothing from the training split into the test split.

``doc_module``: one sentence of documentation -> the family of modules it comes from, with the names masked.
``doc_kind``: the beginning of a docstring -> method, function, class or exception.
``doc_name``: the beginning of a docstring -> the words of the name it documents.
``doc_lm``: language modelling.
Training and held-out items never share an object nor a source text.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import importlib.util
import inspect
import itertools
import math
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
NUMPY_C_CLASSES = frozenset(("ndarray", "dtype", "nditer", "flatiter", "broadcast", "busdaycalendar"))
EXCEPTION_NAME = re.compile(r"(Error|Exception|Warning|Interrupt|Exit)$")


@dataclass(frozen=True)
class DocRecord:
    """One documented object.

    ``name``: qualified name (``email.message.Message.get_payload``); ``module``: the module's dotted name without
    private parts; ``kind``: module, class, exception, function, method, property or topic; ``text``: the docstring,
    unindented; ``split``: train, validation or test.
    """

    name: str
    module: str
    kind: str
    text: str
    split: str

    @property
    def package(self) -> str:
        """Top-level package or module, such as ``email``."""
        return self.module.split(".")[0]

    @property
    def short_name(self) -> str:
        """Last part of the qualified name, such as ``get_payload``."""
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Documentation:
    """The deduplicated corpus: ``records`` sorted by name."""

    records: tuple[DocRecord, ...]

    def split(self, name: str) -> tuple[DocRecord, ...]:
        """Records of the train, validation or test split.

        Raises:
            ValueError: ``name`` is not one of these.
        """
        check_choice("split", name, SPLITS)
        return tuple(record for record in self.records if record.split == name)


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone, on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") / 2.0**64


def split_of(package: str, path: str) -> str:
    """Split of the object ``path`` (``Message.get_payload``) of the top-level package ``package``."""
    position = unit_hash(f"mpoe-documentation:{package}:{path}")
    if position < TEST_SHARE:
        return "test"
    return "validation" if position < TEST_SHARE + VALIDATION_SHARE else "train"


@functools.lru_cache(maxsize=1)
def load_documentation() -> Documentation:
    """Read the whole corpus (about 2 seconds on one core; kept for the life of the process).

    Raises:
        FileNotFoundError: the standard library's sources are not on this machine (for example a zipped installation).
    """
    # Syntax trees are millions of short-lived objects without cycles: garbage collection would take most of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        standard_library = Path(sysconfig.get_path("stdlib"))
        records = list(read_package(standard_library, prefix=""))
        if not records:
            raise FileNotFoundError(f"no documented Python source files found in {standard_library}")
        records += read_topics(standard_library / "pydoc_data" / "topics.py")
        numpy = importlib.util.find_spec("numpy")  # without importing it
        if numpy is not None and numpy.origin:
            records += read_package(Path(numpy.origin).parent, prefix="numpy")
        return Documentation(deduplicate(records))
    finally:
        if collecting:
            gc.enable()


def deduplicate(records: Iterable[DocRecord]) -> tuple[DocRecord, ...]:
    """One record per text (compared by its words) and per name; of equal texts, the first by name is kept."""
    texts: set[str] = set()
    names: set[str] = set()
    kept = []
    for record in sorted(records, key=lambda r: (r.name, r.text)):
        key = " ".join(re.findall(r"\w+", record.text.lower()))
        if key in texts or record.name in names:
            continue
        texts.add(key)
        names.add(record.name)
        kept.append(record)
    return tuple(kept)


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


def read_module(tree: ast.Module, module: str) -> Iterator[DocRecord]:
    """Records of one parsed module: itself, its functions and classes, their methods, numpy's ``add_newdoc`` calls."""
    text = ast.get_docstring(tree)
    if text:
        yield make_record(module, "", "module", text)
    yield from read_body(tree, module, "")
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from read_added_docs(node.value)


def read_body(node: ast.AST, module: str, path: str) -> Iterator[DocRecord]:
    """Records of the definitions directly inside ``node`` (also under if/try), and of nested classes' members."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{path}.{child.name}" if path else child.name
            text = ast.get_docstring(child)
            if text:
                yield make_record(module, inner, kind_of(child, bool(path)), text)
            if isinstance(child, ast.ClassDef):
                yield from read_body(child, module, inner)
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from read_body(child, module, path)


def kind_of(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, in_class: bool) -> str:
    """Kind of a definition, from its syntax alone."""
    if isinstance(node, ast.ClassDef):
        names = [node.name, *(base.id for base in node.bases if isinstance(base, ast.Name))]
        return "exception" if any(EXCEPTION_NAME.search(name) for name in names) else "class"
    decorators = {d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "") for d in node.decorator_list}
    if decorators & {"property", "cached_property", "setter", "getter"}:
        return "property"
    return "method" if in_class else "function"


def read_added_docs(call: ast.Call) -> Iterator[DocRecord]:
    """Records of numpy's ``add_newdoc(module, name, doc)``: doc is a text, (attribute, text) or a list of these."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function != "add_newdoc" or len(call.args) < 3:
        return
    try:
        module, name, documented = (ast.literal_eval(argument) for argument in call.args[:3])
    except ValueError:  # built from other values at import time
        return
    if not str(module).startswith("numpy"):  # numpy.typing documents its aliases with another call of this name
        return
    module = dotted_name("", tuple(str(module).split(".")))
    if isinstance(documented, str):
        kind = "class" if name in NUMPY_C_CLASSES else "function"
        yield make_record(module, name, kind, inspect.cleandoc(documented))
        return
    for attribute, text in [documented] if isinstance(documented, tuple) else documented:
        # Numpy writes a signature first for methods, never for attributes.
        kind = "method" if "(" in text.strip().split("\n", 1)[0] else "property"
        yield make_record(module, f"{name}.{attribute}", kind, inspect.cleandoc(text))


def read_topics(path: Path) -> Iterator[DocRecord]:
    """Paragraph groups of the language reference in ``pydoc_data/topics.py``; nothing where the file is absent."""
    if not path.is_file():
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                try:
                    name, text = ast.literal_eval(key), ast.literal_eval(value)  # type: ignore[arg-type]
                except ValueError:
                    continue
                yield make_record("topics", str(name), "topic", inspect.cleandoc(text))


def make_record(module: str, path: str, kind: str, text: str) -> DocRecord:
    """Record of the object ``path`` in ``module`` ("" = the module itself), put into its split."""
    package = module.split(".")[0]
    return DocRecord(
        name=f"{module}.{path}" if path else module,
        module=module,
        kind=kind,
        text=text.strip(),
        split=split_of(package, path or module),
    )


def prose_sentences(text: str) -> tuple[str, ...]:
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
            words = len(re.findall(r"[A-Za-z]{2,}", sentence))
            if 3 <= words <= 60 and len(sentence) <= 400:
                sentences.append(sentence)
    return tuple(sentences)


def name_words(name: str) -> tuple[str, ...]:
    """Lower-case words of an identifier: ``getPayload_all`` is ``("get", "payload", "all")``."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name))


MASK = "[it]"

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
FAMILY_OF = {prefix: family for family, prefixes in FAMILIES.items() for prefix in prefixes}
# Words that would reveal the family directly.
TELLING = frozenset(
    ("numpy", "np", "tk", "tkinter", "tcl", "asyncio", "importlib", "unittest", "doctest", "multiprocessing", "logging")
)
KIND_LABELS = ("function", "method", "class", "exception")
MAX_SENTENCES = 3  # per object, for doc_module
MAX_PER_FAMILY = {"train": 1200, "validation": 120, "test": 260}
MAX_PER_KIND = {"train": 1400, "validation": 120, "test": 320}


def family_of(module: str) -> str | None:
    """Family of a module by its longest known dotted prefix; None outside all families."""
    prefixes = itertools.accumulate(module.split("."), "{}.{}".format)
    return next((FAMILY_OF[prefix] for prefix in reversed(list(prefixes)) if prefix in FAMILY_OF), None)


def mask_names(text: str, names: Iterable[str]) -> str:
    """``text`` with every whole-word occurrence of ``names`` (any case, also inside dotted paths) replaced by [it]."""
    hidden = {name.lower() for name in names if len(name) > 1}
    masked = re.sub(r"\w+", lambda word: MASK if word[0].lower() in hidden else word[0], text)
    return re.sub(rf"{re.escape(MASK)}(?:\.{re.escape(MASK)})+", MASK, masked)


def own_names(record: DocRecord) -> set[str]:
    """Every identifier in the object's qualified name."""
    return set(record.name.split(".")) | {part.strip("_") for part in record.name.split(".")}


def module_items(record: DocRecord) -> Iterator[Example]:
    """doc_module items of one object: its first sentences, one item each."""
    family = family_of(record.module)
    if family is None or record.kind == "topic":
        return
    hidden = own_names(record) | TELLING | {family}
    for sentence in prose_sentences(record.text)[:MAX_SENTENCES]:
        yield Example(f"subject of: {mask_names(sentence, hidden)}", family)


def kind_items(record: DocRecord) -> Iterator[Example]:
    """doc_kind item of one object: its first sentence."""
    sentences = prose_sentences(record.text)
    if record.kind not in KIND_LABELS or not sentences:
        return
    # "Exception raised when ..." and the like are answers, not evidence.
    hidden = own_names(record) | {*KIND_LABELS, "exceptions", "classes", "methods", "functions"}
    yield Example(f"kind of: {mask_names(' '.join(sentences[:1]), hidden)}", record.kind)


def name_items(record: DocRecord) -> Iterator[Example]:
    """doc_name item of one object: its first two sentences; the name itself is masked, its words are not."""
    sentences = prose_sentences(record.text)
    words = name_words(record.short_name)
    if record.kind in {"topic", "module"} or record.short_name.startswith("__") or not sentences or len(words) > 5:
        return
    if sum(map(len, words)) < 3:
        return
    text = mask_names(" ".join(sentences[:2]), {record.short_name, record.short_name.strip("_")})
    yield Example(f"name of: {text}", " ".join(words))


@functools.lru_cache(maxsize=8)
def task_items(name: str) -> dict[str, tuple[Example, ...]]:
    """All items of an embedded text-to-text task by split, in an order that depends only on the texts.

    A source text that occurs in the training split is dropped from the others, and duplicates within a split are kept
    once; large classes are cut to a limit, so that always answering the most common label scores low.
    """
    make, limits, _ = _TASKS[name]
    seen: set[str] = set()
    items: dict[str, tuple[Example, ...]] = {}
    for split in SPLITS:
        unique: dict[str, Example] = {}
        for record in load_documentation().split(split):
            for example in make(record):
                unique.setdefault(example.source.lower(), example)
        fresh = [example for key, example in unique.items() if key not in seen]
        seen.update(unique)
        counts: Counter[str] = Counter()
        kept = []
        for example in sorted(fresh, key=lambda example: unit_hash(f"order:{example.source}")):
            counts[example.target] += 1
            if counts[example.target] <= limits.get(split, math.inf):
                kept.append(example)
        items[split] = tuple(kept)
    return items


_CLASSES: dict[str, Any] = {"metrics": ("accuracy", "macro_f1"), "max_target_length": 4}
_NAMES = {"kind": "generation", "metrics": ("token_f1", "exact_match"), "max_target_length": 12}
_MODULE = "a sentence of Python documentation -> the family of modules it belongs to (12 classes)"
_KIND = "the first sentence of a docstring -> function, method, class or exception"
_NAME = "the beginning of a docstring -> the words of the name it documents"
# items of an object, limits of a class, fields of the task
_TASKS: dict[str, tuple[Callable[[DocRecord], Iterator[Example]], dict[str, int], dict[str, Any]]] = {
    "doc_module": (module_items, MAX_PER_FAMILY, {"labels": tuple(FAMILIES), "description": _MODULE, **_CLASSES}),
    "doc_kind": (kind_items, MAX_PER_KIND, {"labels": KIND_LABELS, "description": _KIND, **_CLASSES}),
    "doc_name": (name_items, {}, {"description": _NAME, **_NAMES}),
}


def _rows(name: str, split: str) -> tuple[Example, ...]:
    return task_items(name)[split]


EMBEDDED_TASKS = (
    *(Task(n, functools.partial(_rows, n), max_source_length=64, **about) for n, (*_, about) in _TASKS.items()),
    Task(  # every docstring, preceded by the name it documents
        name="doc_lm",
        rows=lambda split: (Example(f"{r.name}\n{r.text}\n") for r in load_documentation().split(split)),
        kind="language_modeling",
        metrics=("perplexity",),
        max_source_length=128,
        description="language modelling of Python documentation",
    ),
)
