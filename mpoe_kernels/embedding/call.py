"""The arguments of the `mpo_embedding` kernels, the same for every backend.

These classes are the ops' signatures: the schemas are derived from their fields.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpoe_kernels.contract import BlockDims


@dataclass
class EmbeddingCall:
    """Its kernel returns the rows ``[T, embedding_dim]``.

    Attributes:
        ids: int64 ``[T]``.
        left, central, right: folded blocks of one expert, ``[1, iL, jL, a]``, ``[a, iC, jC, b]``, ``[1, b, iR, jR]``.
        num_embeddings, embedding_dim: sizes of the table.
        backend: the requested backend, or ``"auto"``.
    """

    ids: Tensor
    left: Tensor
    central: Tensor
    right: Tensor
    num_embeddings: int
    embedding_dim: int
    backend: str

    @property
    def dims(self) -> BlockDims:
        """Sizes of the blocks."""
        return BlockDims.of_blocks(self.left, self.central, self.right, self.num_embeddings, self.embedding_dim)

    @property
    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """left, central, right."""
        return self.left, self.central, self.right


@dataclass
class EmbeddingBackwardCall(EmbeddingCall):
    """Its kernel returns the gradients of left, central and right.

    Attributes:
        grad: ``[T, embedding_dim]``.
    """

    grad: Tensor
