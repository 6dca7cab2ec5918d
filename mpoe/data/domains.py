"""Texts of three domains for the demo: licences of the installed packages, torch's C++ headers, and
the names of Unicode's characters."""

import re
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from mpoe.data.documentation import unit_hash

HELD_OUT = 0.2  # share of the paragraphs, files and runs of names


PACKAGES = ("torch", "numpy", "transformers", "safetensors", "tokenizers", "huggingface-hub")


_LICENCE = re.compile(r"(?i)(licen[cs]e|copying|notice)[^/]*$")


_LONGEST = 20_000  # characters of a header
_CHARACTERS = 0x3000  # code points
_RUN = 8  # names of one item


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
    headers = Path(str(metadata.distribution("torch").locate_file("torch/include/c10")))
    for file in sorted(headers.rglob("*.h")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        yield text[text.find("#") :][:_LONGEST]


def _names() -> Iterator[str]:
    """Runs of neighbouring characters' names, one a line."""
    every = (unicodedata.name(chr(code), "") for code in range(_CHARACTERS))
    names = list(filter(None, every))
    for start in range(0, len(names), _RUN):
        yield "\n".join(names[start : start + _RUN])


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {"law": _licences, "code": _code, "names": _names}


def domain_text(name: str, held_out: bool) -> str:
    """The text of a domain of `DOMAINS`: what an expert trains on, or what is held out."""
    items = [item for item in DOMAINS[name]() if (unit_hash(item[:80]) < HELD_OUT) is held_out]
    items.sort(key=unit_hash)  # no file or package comes first
    return "\n\n".join(items)
