"""Padding of encoded items into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100


def pad(rows: Sequence[list[int]], value: int, side: str = "right", multiple: int = 1) -> Tensor:
    """Lists of integers as one int64 tensor [B, S], filled with ``value`` up to a multiple of ``multiple``."""
    tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
    return torch.nn.functional.pad(padded, (0, -padded.shape[1] % multiple), value=value)


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

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Items -> int64 tensors ``input_ids`` [B, S], ``attention_mask`` [B, S], ``labels`` [B, L] or [B]."""
        if not items:
            raise ValueError("a batch needs at least one item; got none")
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL}
        batch = {}
        for key in fill.keys() & items[0].keys():
            rows = [item[key] for item in items]
            lists = isinstance(rows[0], list)  # or int64 classes, or float32 numbers
            batch[key] = pad(rows, fill[key], multiple=self.pad_to_multiple_of) if lists else torch.tensor(rows)
        return batch
