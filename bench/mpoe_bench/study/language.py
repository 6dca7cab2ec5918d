"""The data of studies: bytes of texts from five domains, each with its own held-out texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mpoe.data.tables import TEXT_COLUMN, find_files, read_table
from mpoe.data.tasks import get_task

BLOCK = 128  # bytes
BATCH = 16  # blocks per step
HELD_OUT = 64  # blocks of every domain to validate on, and to test on
# Domain -> folder of its texts, and the columns that hold them. Documentation comes with Python.
DOMAINS: dict[str, tuple[str, tuple[str, ...]]] = {
    "novels": ("austen", (TEXT_COLUMN,)),
    "documentation": ("", ()),
    "messages": ("sms_spam", ("sentence",)),
    "reviews": ("movie_sentiment", ("sentence",)),
    "usage examples": ("word_in_context", ("sentence1", "sentence2")),
}
Blocks = dict[str, Tensor]  # domain -> int64 [N, BLOCK]


def domain_texts(folder: Path, domain: str, split: str) -> list[str]:
    """The texts of a domain and split.

    Raises:
        FileNotFoundError: the data folder lacks the domain.
    """
    name, columns = DOMAINS[domain]
    if not name:
        return [example.source for example in get_task("doc_lm").examples(split)]
    file = find_files(folder / name).get(split) if (folder / name).is_dir() else None
    if file is None:
        raise FileNotFoundError(f"data_dir must hold {name}/{split}.* for the domain {domain}; {folder} does not")
    return [str(cells[column]) for cells, _ in read_table(file) for column in columns]


def byte_blocks(texts: Sequence[str], block: int = BLOCK) -> Tensor:
    """UTF-8 bytes of ``texts`` with a zero after each, cut into int64 ``[N, block]``; the rest is dropped."""
    data = bytearray(b"".join(text.encode() + bytes(1) for text in texts))
    count = len(data) // block
    return torch.frombuffer(data, dtype=torch.uint8)[: count * block].view(count, block).long()


def read_blocks(folder: Path) -> dict[str, Blocks]:
    """split -> domain -> blocks.

    Raises:
        FileNotFoundError: see `domain_texts`.
    """
    found: dict[str, Blocks] = {}
    for split in ("train", "validation", "test"):
        parts = {domain: byte_blocks(domain_texts(folder, domain, split)) for domain in DOMAINS}
        found[split] = parts if split == "train" else {domain: ids[:HELD_OUT] for domain, ids in parts.items()}
    return found


def batches(train: Blocks, seed: int, steps: int) -> Iterator[Tensor]:
    """``steps`` batches ``[BATCH, BLOCK]``, the same for every arm.

    Domains are drawn in proportion to the square roots of their sizes, blocks in shuffled passes over a domain.
    """
    generator = torch.Generator().manual_seed(10_000 + seed)
    weights = torch.tensor([math.sqrt(len(ids)) for ids in train.values()])
    pools: dict[str, Iterator[Tensor]] = {domain: iter(()) for domain in train}

    def take(domain: str) -> Tensor:
        row = next(pools[domain], None)
        if row is None:
            pools[domain] = iter(train[domain][torch.randperm(len(train[domain]), generator=generator)])
            row = next(pools[domain])
        return row

    domains = list(train)
    for _ in range(steps):
        chosen = torch.multinomial(weights, BATCH, replacement=True, generator=generator).tolist()
        yield torch.stack([take(domains[index]) for index in chosen])
