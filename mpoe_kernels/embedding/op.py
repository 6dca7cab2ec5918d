"""`mpo_embedding`: lookup of rows in a table stored as an MPO, by PyTorch's operations on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.backends import requested_backend
from mpoe_kernels.checks import check_device, check_same, describe
from mpoe_kernels.define import define_op
from mpoe_kernels.embedding import eager
from mpoe_kernels.embedding.call import EmbeddingBackwardCall, EmbeddingCall
from mpoe_kernels.mpo.fold import MPOBlocks


def _fake(call: EmbeddingCall) -> Tensor:
    return call.central.new_empty(call.ids.shape[0], call.embedding_dim)


def _backward_fake(call: EmbeddingBackwardCall) -> tuple[Tensor, ...]:
    return tuple(torch.empty(block.shape, dtype=block.dtype, device=block.device) for block in call.blocks)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.sizes = inputs[4:]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward(*ctx.saved_tensors, *ctx.sizes, grad.contiguous())
    needed = (g if n else None for g, n in zip(grads, ctx.needs_input_grad[1:4], strict=True))
    return None, *needed, None, None, None


_backward = define_op(
    "mpo_embedding_backward",
    EmbeddingBackwardCall,
    3,
    lambda call: eager.backward(call),
    _backward_fake,
)
_forward = define_op(
    "mpo_embedding",
    EmbeddingCall,
    1,
    lambda call: eager.forward(call),
    _fake,
    setup_context=_setup,
    backward=_autograd,
    autocast=("left", "central", "right"),
)


def mpo_embedding(ids: Tensor, blocks: MPOBlocks, *, backend: str | None = None) -> Tensor:
    """Rows ``ids`` of the table ``[num_embeddings, embedding_dim]`` that ``blocks`` represent.

    Args:
        ids: int32 or int64 of any shape; entries below the true vocabulary size ``blocks.in_features``.
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
    if not isinstance(blocks, MPOBlocks):
        raise TypeError(f"blocks must be MPOBlocks (see fold); got {type(blocks).__name__}")
    if blocks.num_experts != 1:
        raise ValueError(f"blocks must hold one expert for mpo_embedding; got {blocks.num_experts}")
    check_same("central", blocks.central, left=blocks.left, right=blocks.right)
    check_device("central", blocks.central, ids=ids)
    flat = ids.reshape(-1).long()
    rows = _forward(
        flat,
        blocks.left,
        blocks.central,
        blocks.right,
        blocks.in_features,
        blocks.out_features,
        requested_backend(backend),
    )
    return rows.view(*ids.shape, blocks.out_features)
