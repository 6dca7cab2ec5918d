"""Rows of a table stored as an MPO, by the kernels of csrc/cuda/embedding/embedding.h. Calls and results: see
`call`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpoe_kernels.contract import may_round_to_tf32
from mpoe_kernels.embedding.call import EmbeddingBackwardCall, EmbeddingCall
from mpoe_kernels.indices import check_ids


@dataclass(frozen=True)
class EmbeddingKernels:
    """The two kernels of the op.

    Attributes:
        ops: namespace of the compiled ops.
    """

    ops: Any

    def forward(self, call: EmbeddingCall) -> Tensor:
        """An id outside the table is an error; on a GPU, a device-side assertion."""
        check_ids(call.ids, call.num_embeddings)
        return self.ops.embedding_forward(call.ids, *call.blocks, *self._sizes(call))

    def backward(self, call: EmbeddingBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
        return self.ops.embedding_backward(call.grad, call.ids, *call.blocks, *self._sizes(call))

    @staticmethod
    def _sizes(call: EmbeddingCall) -> tuple[int, int, bool]:
        return call.num_embeddings, call.embedding_dim, may_round_to_tf32(call.central.dtype)

    def table(self) -> dict[str, Callable[[Any], Any]]:
        return {"mpo_embedding": self.forward, "mpo_embedding_backward": self.backward}
