"""Padding of encoded items into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED_LABEL = -100


@dataclass(frozen=True)
class PaddingCollator:
    """Pads items on the right to the longest of the batch.

    ``input_ids`` are padded with ``pad_token_id``, ``attention_mask`` with 0, ``labels`` with -100 (not counted in
    the loss), unless they are one class or number per item. Other keys are ignored.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.pad_token_id is None or self.pad_token_id < 0:
            raise ValueError(f"pad_token_id must be a token id >= 0; got {self.pad_token_id}")
        if self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be >= 1; got {self.pad_to_multiple_of}")

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Items -> int64 tensors ``input_ids`` [B, S], ``attention_mask`` [B, S], ``labels`` [B, L] or [B]."""
        if not items:
            raise ValueError("a batch needs at least one item; got none")
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL}
        return {key: self._pad([item[key] for item in items], value) for key, value in fill.items() if key in items[0]}

    def _pad(self, rows: list[Any], value: int) -> torch.Tensor:
        if not isinstance(rows[0], list):
            return torch.tensor(rows)  # int64 classes or float32 numbers
        longest = max(len(row) for row in rows)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        out = torch.full((len(rows), width), value, dtype=torch.int64)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
        return out
