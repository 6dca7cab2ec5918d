"""What works without a download: the stand-in checkpoints, a tiny T5 and a tiny GPT-2; English text
that comes with every Python installation, its own documentation, and the embedded tasks made of it;
and the texts of the demo.

The stand-ins saw the training split of the documentation only; ``stand_ins/README.md`` tells how
they were made. They are not a substitute for real pretrained weights.

The docstrings of the standard library and of numpy are read from the source files with :mod:`ast`,
and the prose of ``pydoc_data.topics``; nothing is downloaded or stored. The corpus therefore
differs a little between Python and numpy versions, but an object falls into the same split
everywhere: the split is a hash of its top-level package and its name inside the module, so a module
that moves within its package (``pathlib`` -> ``pathlib._local``) takes nothing from the training
split into the test split.

``doc_module``: one sentence of documentation -> the family of modules it comes from, with the names
masked. ``doc_lm``: language modelling. Training and held-out items never share an object nor a
source text.

The texts of the demo's three domains are licences of the installed packages, torch's C++ headers,
and the names of Unicode's characters.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import itertools
import re
import runpy
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from mpoe.config.checks import check_choice
from mpoe.data.task import SPLITS, Example, Task

STAND_INS = {"t5": "AutoModelForSeq2SeqLM", "gpt2": "AutoModelForCausalLM"}


def stand_in_path(kind: str) -> Path:
    """Folder of the stand-in ``kind`` ("t5" or "gpt2"): config, weights and tokenizer for
    ``from_pretrained``.

    Raises:
        ValueError: unknown kind.
    """
    check_choice("stand-in", kind, list(STAND_INS))
    return Path(__file__).resolve().parent / "stand_ins" / kind


def load_stand_in(kind: str) -> tuple[Any, Any]:
    """The stand-in model (float32, in eval mode, on the CPU) and its tokenizer; raises as
    :func:`stand_in_path`."""
    folder = stand_in_path(kind)
    import transformers

    model_class = getattr(transformers, STAND_INS[kind])
    model = model_class.from_pretrained(folder, dtype="float32", local_files_only=True)
    if kind == "gpt2":
        model.loss_type = (
            "ForCausalLM"  # GPT2LMHeadModel leaves it unset, which warns at the first loss
        )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


# ------------------------------------------------------------------ documentation

# Third-party packages, test code, graphical demos and packages that only some Python versions (or
# distributions) have.
SKIPPED_PARTS = frozenset(
    (
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "__pycache__",
        "pydoc_data",
        "ensurepip",
        "_pyinstaller",
    )
    + (
        "test",
        "tests",
        "testing_tools",
        "conftest.py",
        "idlelib",
        "turtledemo",
        "lib2to3",
        "distutils",
    )
    + (
        "__phello__",
        "__hello__.py",
        "this.py",
        "antigravity.py",
        "sitecustomize.py",
        "usercustomize.py",
    )
)


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
    return (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
        / 2.0**64
    )


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
    if public and public[0] in {
        "pydecimal",
        "pyio",
        "pydatetime",
    }:  # pure-Python twins of C modules
        public[0] = public[0].removeprefix("py")
    return ".".join(public)


def read_module(node: ast.AST, module: str, path: str = "") -> Iterator[DocRecord]:
    """Records of a parsed module or of the definition ``path`` in it, of what is defined inside (in
    modules and classes, also under if/try), and of numpy's ``add_newdoc`` calls."""
    if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        text = ast.get_docstring(node)
        if text:
            yield _record(module, path, text)
    for child in (
        []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        else ast.iter_child_nodes(node)
    ):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
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


# ------------------------------------------------------------------ doc_module

MASK = "[it]"
MAX_SENTENCES = 3  # per object
# family -> dotted module prefixes. Grouped by subject, so that each has some hundred sentences on
# any Python >= 3.11.
_PREFIXES = {
    "array": "numpy.core numpy.lib numpy.matrixlib numpy.ma",
    "number": "numpy.polynomial numpy.linalg numpy.fft statistics fractions decimal random",
    "window": "tkinter turtle curses",
    "async": "asyncio selectors socketserver socket ssl",
    "mail": "email mailbox smtplib imaplib poplib",
    "web": "http urllib wsgiref xmlrpc html ftplib ipaddress",
    "import": "importlib pkgutil zipimport runpy modulefinder",
    "log": "logging warnings traceback argparse optparse configparser",
    "test": "unittest doctest pdb bdb numpy.testing",
    "process": "multiprocessing threading concurrent queue subprocess sched",
    "file": "tarfile zipfile shutil pathlib tempfile gzip bz2 lzma os io",
    "code": "inspect ast typing dis tokenize symtable enum dataclasses pydoc xml",
}
FAMILIES = {
    family: tuple(f"{prefix}." for prefix in own.split()) for family, own in _PREFIXES.items()
}
# Words that would reveal the family directly.
TELLING = frozenset(
    (
        "numpy",
        "np",
        "tk",
        "tkinter",
        "tcl",
        "asyncio",
        "importlib",
        "unittest",
        "doctest",
        "multiprocessing",
        "logging",
    )
)


def family_of(name: str) -> str | None:
    """Family of an object or module, None outside all families."""
    return next(
        (family for family, prefixes in FAMILIES.items() if f"{name}.".startswith(prefixes)), None
    )


def mask_names(text: str, names: set[str]) -> str:
    """``text`` with every whole-word occurrence of ``names`` (any case, also inside dotted paths)
    replaced by [it]."""
    hidden = {name.lower() for name in names if len(name) > 1}
    masked = re.sub(r"\w+", lambda word: MASK if word[0].lower() in hidden else word[0], text)
    return re.sub(rf"{re.escape(MASK)}(?:\.{re.escape(MASK)})+", MASK, masked)


def module_items(record: DocRecord) -> Iterator[Example]:
    """doc_module items of one object: the first sentences of its first paragraph, one item each."""
    family = family_of(record.name)
    if family is not None:
        parts = record.name.split(".")
        hidden = {*parts, *(part.strip("_") for part in parts), *TELLING, family}
        paragraph = " ".join(record.text.partition("\n\n")[0].split())
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[:MAX_SENTENCES]:
            if len(re.findall(r"[A-Za-z]{2,}", sentence)) >= 3:
                yield Example(f"subject of: {mask_names(sentence, hidden)}", family)


@functools.cache
def _modules() -> dict[str, list[Example]]:
    """All items of doc_module by split, in an order that depends only on the texts; a source text
    occurs once, in training if it can."""
    known: set[str] = set()
    examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for split, items in examples.items():
        for example in itertools.chain.from_iterable(map(module_items, load_documentation(split))):
            if example.source.lower() not in known:
                known.add(example.source.lower())
                items.append(example)
        items.sort(key=lambda example: unit_hash(f"order:{example.source}"))
    return examples


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


# ------------------------------------------------------------------ the demo's domains

HELD_OUT = 0.2  # share of the paragraphs, files and runs of names
PACKAGES = ("torch", "numpy", "transformers", "safetensors", "tokenizers", "huggingface-hub")
_LICENCE = re.compile(r"(?i)(licen[cs]e|copying|notice)[^/]*(|\.txt|\.md)$")
_LONGEST, _CHARACTERS, _RUN = (
    20_000,
    0x3000,
    8,
)  # characters of a header; code points; names of one item


def _licences() -> Iterator[str]:
    """Paragraphs, each once however many packages have it."""
    known: set[str] = set()
    files = [Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"]
    for package in PACKAGES:
        entries = metadata.files(package) or []
        files += [Path(str(entry.locate())) for entry in entries if _LICENCE.search(str(entry))]
    for file in filter(Path.is_file, files):
        for paragraph in re.split(r"\n\s*\n", file.read_text(encoding="utf-8", errors="ignore")):
            words = " ".join(paragraph.split())
            letters = re.sub(r"\W", "", words.lower())
            if len(words) > 80 and letters not in known:
                known.add(letters)
                yield words


def _code() -> Iterator[str]:
    """C++ headers of torch without the licences at their head."""
    for file in sorted(
        (Path(str(metadata.distribution("torch").locate_file("torch"))) / "include/c10").rglob(
            "*.h"
        )
    ):
        text = file.read_text(encoding="utf-8", errors="ignore")
        yield text[text.find("#") :][:_LONGEST]


def _names() -> Iterator[str]:
    """Runs of neighbouring characters' names, one a line."""
    names = [
        name for name in (unicodedata.name(chr(code), "") for code in range(_CHARACTERS)) if name
    ]
    for start in range(0, len(names), _RUN):
        yield "\n".join(names[start : start + _RUN])


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {"law": _licences, "code": _code, "names": _names}


def domain_text(name: str, held_out: bool) -> str:
    """The text of a domain of `DOMAINS`: what an expert trains on, or what is held out."""
    items = [item for item in DOMAINS[name]() if (unit_hash(item[:80]) < HELD_OUT) is held_out]
    items.sort(key=unit_hash)  # no file or package comes first
    return "\n\n".join(items)
