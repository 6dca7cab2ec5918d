"""`mpo_embedding`: lookup of rows in a table stored as an MPO, by PyTorch's operations on every
device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpoe_kernels.checks import describe
from mpoe_kernels.contract import BlockDims
from mpoe_kernels.define import Differentiable, define_differentiable, requested_backend
from mpoe_kernels.embedding import eager
from mpoe_kernels.mpo.fold import MPOBlocks, check_blocks
from mpoe_kernels.signatures import as_index


@dataclass
class EmbeddingCall(Differentiable):
    """Its kernel returns the rows ``[T, embedding_dim]``.

    Attributes:
        ids: int64 ``[T]``.
        left, central, right: folded blocks of one expert, ``[1, iL, jL, a]``, ``[a, iC, jC, b]``,
            ``[1, b, iR, jR]``.
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

    DIFFERENTIABLE = ("left", "central", "right")

    @property
    def dims(self) -> BlockDims:
        """Sizes of the blocks."""
        return BlockDims.of_blocks(
            self.left, self.central, self.right, self.num_embeddings, self.embedding_dim
        )


@dataclass
class EmbeddingBackwardCall(EmbeddingCall):
    """Its kernel returns the gradients of left, central and right; those that are not needed are
    empty.

    Attributes: grad: ``[T, embedding_dim]``. need: which gradients are needed.
    """

    grad: Tensor
    need: list[bool]


def _fake(call: EmbeddingCall) -> Tensor:
    return call.central.new_empty(call.ids.shape[0], call.embedding_dim)


_forward = define_differentiable(
    "mpo_embedding",
    EmbeddingCall,
    EmbeddingBackwardCall,
    _fake,
    autocast=EmbeddingCall.DIFFERENTIABLE,
    kernels={"mpo_embedding": eager.forward, "mpo_embedding_backward": eager.backward},
)


def mpo_embedding(ids: Tensor, blocks: MPOBlocks, *, backend: str | None = None) -> Tensor:
    """Rows ``ids`` of the table ``[num_embeddings, embedding_dim]`` that ``blocks`` represent.

    Args:
        ids: int32 or int64 of any shape; entries below the true vocabulary size
            ``blocks.in_features``.
        blocks: folded cores with E = 1; I is the vocabulary, F the embedding size.
        backend: as in `grouped_mpo_linear`; PyTorch's operations compute every one.

    Returns:
        ``[*ids.shape, embedding_dim]`` in the blocks' dtype. Differentiable in the blocks.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or dtype.
        IndexError: an id outside the table (CPU).
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be an int32 or int64 tensor; got {describe(ids)}")
    check_blocks("blocks", blocks)
    if blocks.num_experts != 1:
        raise ValueError(f"blocks must hold one expert for mpo_embedding; got {blocks.num_experts}")
    rows = _forward(
        as_index("ids", ids.reshape(-1)),
        blocks.left,
        blocks.central,
        blocks.right,
        blocks.in_features,
        blocks.out_features,
        requested_backend(backend),
    )
    return rows.view(*ids.shape, blocks.out_features)
