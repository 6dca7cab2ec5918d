"""The embedded tasks, made of Python's documentation.

``doc_module``: one sentence of documentation -> the family of modules it comes from, with the names
masked. ``doc_lm``: language modelling. Training and held-out items never share an object nor a
source text.
"""

import functools
import itertools
import re
from collections.abc import Iterator

from mpoe.data.documentation import DocRecord, load_documentation, unit_hash
from mpoe.data.task import SPLITS, Example, Task

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
TELLING = {
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
}


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
        for example in itertools.chain(*map(module_items, load_documentation(split))):
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
