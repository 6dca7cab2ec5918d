"""Texts of studies: domains with held-out texts, as bytes or as tokens; tenants and probes."""

import ast
import math
from collections.abc import Iterator, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpoe.data.tables import TEXT_COLUMN, find_files, is_text_file, read_table
from mpoe.data.tasks import get_task
from mpoe.models.background import pieces

SPLITS = ("train", "validation", "test")
BLOCK = 128  # bytes
BATCH = 16  # blocks per step
HELD_OUT = 64  # blocks of every domain to validate on, and to test on
# Domain -> folder of its texts, and the columns that hold them. Documentation comes with Python.
DOMAINS = {
    "novels": ("austen", (TEXT_COLUMN,)),
    "documentation": ("", ()),
    "messages": ("sms_spam", ("sentence",)),
    "reviews": ("movie_sentiment", ("sentence",)),
    "usage examples": ("word_in_context", ("sentence1", "sentence2")),
}
Blocks = dict[str, Tensor]  # domain -> int64 [N, BLOCK]

LENGTH = 128  # tokens of a piece
PIECES = 16  # pieces of a text to validate on, and to test on
DESCRIBED = (
    "numpy",
    "scipy",
    "pandas",
    "networkx",
    "matplotlib",
    "scikit-learn",
    "rich",
    "hypothesis",
)
Split = tuple[Tensor, Tensor, Tensor]  # train, validation, test


def domain_texts(folder: Path, domain: str, split: str) -> list[str]:
    """The texts of a domain and split.

    Raises:
        FileNotFoundError: the data folder lacks the domain.
    """
    name, columns = DOMAINS[domain]
    if not name:
        return [example.source for example in get_task("doc_lm").examples(split)]
    return column_texts(folder, name, columns, split)


def column_texts(folder: Path, name: str, columns: Sequence[str], split: str) -> list[str]:
    """The cells of some columns of a data set's split; of a text file its lines.

    Raises:
        FileNotFoundError: the data folder lacks the data set.
    """
    file = find_files(folder / name).get(split) if (folder / name).is_dir() else None
    if file is None:
        raise FileNotFoundError(f"data_dir must hold {name}/{split}.*; {folder} does not")
    texts = [str(cells[column]) for cells, _ in read_table(file) for column in columns]
    if not is_text_file(file):
        return texts
    return [line.strip() for line in "".join(texts).splitlines()]


def byte_blocks(texts: Sequence[str], block: int = BLOCK) -> Tensor:
    """UTF-8 bytes of ``texts`` with a zero after each, int64 ``[N, block]``; the rest is
    dropped."""
    data = bytearray(b"".join(text.encode() + bytes(1) for text in texts))
    count = len(data) // block
    data = data[: count * block]
    return torch.frombuffer(data, dtype=torch.uint8).view(count, block).long()


def read_blocks(folder: Path) -> dict[str, Blocks]:
    """split -> domain -> blocks.

    Raises:
        FileNotFoundError: see `domain_texts`.
    """
    blocks = {}
    for split in SPLITS:
        most = None if split == "train" else HELD_OUT
        texts = {domain: domain_texts(folder, domain, split) for domain in DOMAINS}
        blocks[split] = {domain: byte_blocks(lines)[:most] for domain, lines in texts.items()}
    return blocks


def batches(train: Blocks, seed: int, steps: int) -> Iterator[Tensor]:
    """``steps`` batches ``[BATCH, BLOCK]``, the same for every arm.

    Domains are drawn in proportion to the square roots of their sizes, blocks in shuffled passes
    over a domain.
    """
    generator = torch.Generator().manual_seed(10_000 + seed)
    weights = torch.tensor([math.sqrt(len(ids)) for ids in train.values()])

    def passes(ids: Tensor) -> Iterator[Tensor]:
        while True:
            yield from ids[torch.randperm(len(ids), generator=generator)]

    pools = [passes(ids) for ids in train.values()]
    for _ in range(steps):
        chosen = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        yield torch.stack([next(pools[index]) for index in chosen.tolist()])


def pieces_of(tokenizer: Any, texts: Sequence[str], most: int | None = None) -> Tensor:
    """The texts as one, cut into pieces: all of them, or the first."""
    text = "\n".join(texts)
    return pieces(text, tokenizer, LENGTH, most or len(text))


def split_of(tokenizer: Any, train: Sequence[str], *held_out: Sequence[str]) -> Split:
    """Pieces of a domain's or a tenant's texts."""
    validation, test = (pieces_of(tokenizer, texts, PIECES) for texts in held_out)
    return pieces_of(tokenizer, train), validation, test


def docstrings(package: str) -> Iterator[str]:
    """Those of a package's modules, classes and functions, from its sources in the order of their
    names."""
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"tenants must be packages that are installed; {package} is not")
    for file in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 300:
                    yield text


def tenant_texts(tokenizer: Any, package: str) -> Split:
    """Train, validation and test of a package's docstrings, cut where a docstring ends."""
    texts = []
    for text in docstrings(package):
        texts.append(text)
        if sum(map(len, texts)) > 1_500_000:
            break
    part = len(texts) // 8
    return split_of(tokenizer, texts[2 * part :], texts[:part], texts[part : 2 * part])


def _headers() -> list[str]:
    """C++ headers of torch."""
    files = sorted(Path(torch.__file__).parent.glob("include/ATen/*.h"))
    texts = (file.read_text(encoding="utf-8") for file in files)
    return [text for text in texts if len(text) > 2_000]


def probe_texts(folder: Path, probe: str) -> list[str]:
    """The texts of a probe that no expert and no background has seen.

    Raises:
        FileNotFoundError: ``folder`` lacks the ratings.
        ValueError: a probe that is not known.
    """
    if probe == "headers":
        return _headers()
    if probe == "ratings":
        return column_texts(folder, "sentiment_rating", ["sentence"], "test")
    if probe == "descriptions":
        return [str(metadata.metadata(package).get_payload()) for package in DESCRIBED]
    raise ValueError(f"probes must be headers, ratings or descriptions; got {probe!r}")
