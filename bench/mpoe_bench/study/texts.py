"""Texts of experts that are composed: domains, probes, a background, requests that change their domain halfway."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpoe_bench.study.language import DOMAINS, domain_texts

LENGTH = 128  # tokens of a piece
HELD_OUT = 24  # pieces of a text to validate on, and to test on
REQUESTS = 4  # for every pair of domains
LICENSED = ("numpy", "matplotlib", "scikit-learn", "torch")  # packages whose licences are the background
PROBES = {"documentation": "documentation", "sources": ""}


Split = tuple[Tensor, Tensor, Tensor]  # train, validation, test


@dataclass(frozen=True)
class Texts:
    """Token ids, int64 ``[N, LENGTH]``.

    Attributes:
        splits: by domain.
        probes: by name.
        background: of no domain.
        halfway: requests; the first half of each is of the domain ``first``, the second of another one.
        first: numbers of domains, in the order of ``splits``, ``[N]``.
    """

    splits: Mapping[str, Split]
    probes: Mapping[str, Tensor]
    background: Tensor
    halfway: Tensor
    first: Tensor

    @property
    def test(self) -> dict[str, Tensor]:
        return {domain: test for domain, (_, _, test) in self.splits.items()}


def pieces(tokenizer: Any, texts: Sequence[str], most: int | None = None) -> Tensor:
    """The texts as one, cut into pieces; what is left at the end is dropped."""
    joined = "\n".join(texts) if most is None else "\n".join(texts)[: most * LENGTH * 12]
    ids = torch.tensor(tokenizer(joined, verbose=False)["input_ids"])
    count = len(ids) // LENGTH
    return ids[: count * LENGTH].view(count, LENGTH)[:most]


def docstrings(package: str) -> Iterator[str]:
    """Those of a package's modules, classes and functions, from its sources in the order of their names."""
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"tenants must be packages that are installed; {package} is not")
    for file in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found = ast.get_docstring(node) or ""
                if len(found) > 300:
                    yield found


def tenant_texts(tokenizer: Any, package: str) -> Split:
    """Train, validation and test of a package's docstrings, cut where a docstring ends."""
    found: list[str] = []
    for text in docstrings(package):
        found.append(text)
        if sum(map(len, found)) > 1_500_000:
            break
    held_out = len(found) // 8
    parts = found[2 * held_out :], found[:held_out], found[held_out : 2 * held_out]
    return pieces(tokenizer, parts[0]), pieces(tokenizer, parts[1], HELD_OUT), pieces(tokenizer, parts[2], HELD_OUT)


def _licences() -> list[str]:
    files = [file for name in LICENSED for file in metadata.files(name) or [] if "LICENSE" in file.name.upper()]
    return [file.read_text(encoding="utf-8") for file in files if file.suffix in ("", ".txt")]


def _sources() -> list[str]:
    """The middle of modules of the standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [text[20_000:24_000] for text in (file.read_text(encoding="utf-8") for file in files) if len(text) > 24_000]


def _halfway(test: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    half, names = LENGTH // 2, list(test)
    requests: list[Tensor] = []
    first: list[int] = []
    for a, one in enumerate(names):
        for other in names:
            if one != other:
                rows = slice(REQUESTS * len(requests) % (HELD_OUT - REQUESTS), None)
                pairs = torch.cat([test[one][rows][:REQUESTS, :half], test[other][rows][:REQUESTS, half:]], 1)
                requests.append(pairs)
                first += [a] * REQUESTS
    return torch.cat(requests), torch.tensor(first)


def read_texts(tokenizer: Any, folder: Path, domains: Sequence[str], probes: Sequence[str]) -> Texts:
    """All texts but the tenants'.

    Raises:
        FileNotFoundError: ``folder`` lacks a domain.
        ValueError: a domain or probe that is not known.
    """
    for name, known in (*((d, DOMAINS) for d in domains), *((p, PROBES) for p in probes)):
        if name not in known:
            raise ValueError(f"domains and probes must be among {', '.join(known)}; got {name!r}")
    splits: dict[str, Split] = {}
    for domain in domains:
        train, *held_out = (domain_texts(folder, domain, split) for split in ("train", "validation", "test"))
        validation, test = (pieces(tokenizer, some, HELD_OUT) for some in held_out)
        splits[domain] = pieces(tokenizer, train), validation, test
    probed = {
        name: pieces(tokenizer, domain_texts(folder, PROBES[name], "test") if PROBES[name] else _sources(), HELD_OUT)
        for name in probes
    }
    halfway = _halfway({domain: test for domain, (_, _, test) in splits.items()})
    return Texts(splits, probed, pieces(tokenizer, _licences(), 256), *halfway)
