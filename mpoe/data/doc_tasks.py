"""The embedded tasks: real questions about the running Python's own documentation.

``doc_module``: one sentence of documentation -> the family of modules it comes from, with the names masked.
``doc_kind``: the beginning of a docstring -> method, function, class or exception.
``doc_name``: the beginning of a docstring -> the words of the name it documents.
``doc_lm``: language modelling.
Training and held-out items never share an object (the corpus is split by a hash of the name) nor a source text.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mpoe.data.documentation import (
    SPLITS,
    DocRecord,
    load_documentation,
    name_words,
    prose_sentences,
    unit_hash,
)
from mpoe.data.task import Example, Task

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


MAKERS = {"doc_module": module_items, "doc_kind": kind_items, "doc_name": name_items}
LIMITS = {"doc_module": MAX_PER_FAMILY, "doc_kind": MAX_PER_KIND, "doc_name": None}


@functools.lru_cache(maxsize=8)
def task_items(name: str) -> dict[str, tuple[Example, ...]]:
    """All items of an embedded text-to-text task by split, in an order that depends only on the texts.

    A source text that occurs in the training split is dropped from the others, and duplicates within a split are kept
    once; large classes are cut to a limit, so that always answering the most common label scores low.
    """
    seen: set[str] = set()
    items: dict[str, tuple[Example, ...]] = {}
    for split in SPLITS:
        unique: dict[str, Example] = {}
        for record in load_documentation().split(split):
            for example in MAKERS[name](record):
                unique.setdefault(example.source.lower(), example)
        fresh = [example for key, example in unique.items() if key not in seen]
        seen.update(unique)
        fresh.sort(key=lambda example: unit_hash(f"order:{example.source}"))
        limits = LIMITS[name]
        items[split] = tuple(limit_labels(fresh, limits[split]) if limits else fresh)
    return items


def limit_labels(examples: Iterable[Example], limit: int) -> Iterator[Example]:
    """The first ``limit`` examples of every target."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.target] = counts.get(example.target, 0) + 1
        if counts[example.target] <= limit:
            yield example


_CLASSES: dict[str, Any] = {"metrics": ("accuracy", "macro_f1"), "max_target_length": 4}
_ABOUT: dict[str, dict[str, Any]] = {
    "doc_module": {
        "labels": tuple(FAMILIES),
        "description": "a sentence of Python documentation -> the family of modules it belongs to (12 classes)",
        **_CLASSES,
    },
    "doc_kind": {
        "labels": KIND_LABELS,
        "description": "the first sentence of a docstring -> function, method, class or exception",
        **_CLASSES,
    },
    "doc_name": {
        "kind": "generation",
        "metrics": ("token_f1", "exact_match"),
        "max_target_length": 12,
        "description": "the beginning of a docstring -> the words of the name it documents",
    },
}


def _rows(name: str, split: str) -> tuple[Example, ...]:
    return task_items(name)[split]


EMBEDDED_TASKS = (
    *(Task(name, functools.partial(_rows, name), max_source_length=64, **about) for name, about in _ABOUT.items()),
    Task(  # every docstring, preceded by the name it documents
        name="doc_lm",
        rows=lambda split: (Example(f"{r.name}\n{r.text}\n") for r in load_documentation().split(split)),
        kind="language_modeling",
        metrics=("perplexity",),
        max_source_length=128,
        description="language modelling of Python documentation",
    ),
)
