"""Padding of encoded items into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORED_LABEL = -100


@dataclass(frozen=True)
class PaddingCollator:
    """Pads items on the right to the longest of the batch.

    ``input_ids`` are padded with ``pad_token_id``, ``attention_mask`` with 0, ``labels`` with -100 (not counted in
    the loss). Works for both text-to-text and language-modelling items; other keys are ignored.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.pad_token_id is None or self.pad_token_id < 0:
            raise ValueError(f"pad_token_id must be a token id >= 0; got {self.pad_token_id}")
        if self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be >= 1; got {self.pad_to_multiple_of}")

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Items -> int64 tensors ``input_ids`` [B, S], ``attention_mask`` [B, S], ``labels`` [B, L]."""
        if not items:
            raise ValueError("a batch needs at least one item; got none")
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL}
        return {key: self._pad([item[key] for item in items], value) for key, value in fill.items() if key in items[0]}

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        longest = max(len(row) for row in rows)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        out = torch.full((len(rows), width), value, dtype=torch.int64)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
        return out
