"""Rows of a table kept as an MPO, by the kernels of csrc/cuda/embedding.h; arguments and results as the eager ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpoe_kernels.indices import check_ids
from mpoe_kernels.planner import may_round_to_tf32


@dataclass(frozen=True)
class EmbeddingKernels:
    """The two kernels of the op.

    Attributes:
        ops: namespace of the compiled ops.
    """

    ops: Any

    def forward(
        self, ids: Tensor, left: Tensor, central: Tensor, right: Tensor, num_embeddings: int, embedding_dim: int
    ) -> Tensor:
        """``[T] -> [T, embedding_dim]``; an id outside the table is an error, on a GPU by an assertion there."""
        check_ids(ids, num_embeddings)
        sizes = (num_embeddings, embedding_dim, may_round_to_tf32(central.dtype))
        return self.ops.embedding_forward(ids, left, central, right, *sizes)

    def backward(
        self,
        grad: Tensor,
        ids: Tensor,
        left: Tensor,
        central: Tensor,
        right: Tensor,
        num_embeddings: int,
        embedding_dim: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of left, central and right."""
        sizes = (num_embeddings, embedding_dim, may_round_to_tf32(central.dtype))
        return self.ops.embedding_backward(grad, ids, left, central, right, *sizes)

    def table(self) -> dict[str, Callable[..., Any]]:
        return {"mpo_embedding": self.forward, "mpo_embedding_backward": self.backward}
