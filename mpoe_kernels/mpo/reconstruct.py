"""From cores back to the matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpoe_kernels.checks import check_device, check_memory
from mpoe_kernels.mpo.fold import MPOBlocks, fold
from mpoe_kernels.mpo.shape import MPOShape


def expert_weights(blocks: MPOBlocks) -> Tensor:
    """All experts' weights ``[E, I, F]``: for inspection and export, never on the fast path.
    Differentiable.

    Raises:
        TypeError: ``blocks`` is not an `MPOBlocks`.
        ValueError: its tensors are on several devices, or without their memory.
    """
    if not isinstance(blocks, MPOBlocks):
        raise TypeError(f"blocks must be MPOBlocks (see fold); got {type(blocks).__name__}")
    check_device("left", blocks.left, central=blocks.central, right=blocks.right)
    if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        for name in ("left", "central", "right"):
            if type(block := getattr(blocks, name)) in (Tensor, torch.nn.Parameter):
                check_memory(name, block)
    experts, rows_l, cols_l, a = blocks.left.shape
    _, rows_c, cols_c, b = blocks.central.shape
    _, _, rows_r, cols_r = blocks.right.shape
    half = blocks.left.reshape(experts, -1, a) @ blocks.central.reshape(a, -1)
    full = half.reshape(experts, -1, b) @ blocks.right.reshape(experts, b, -1)
    full = full.view(experts, rows_l, cols_l, rows_c, cols_c, rows_r, cols_r).permute(
        0, 1, 3, 5, 2, 4, 6
    )
    padded = full.reshape(experts, rows_l * rows_c * rows_r, cols_l * cols_c * cols_r)
    return padded[:, : blocks.in_features, : blocks.out_features]


def reconstruct(cores: Sequence[Tensor], shape: MPOShape | None = None) -> Tensor:
    """Weight of a chain of cores.

    Args:
        cores: ``[d, i, j, d']`` each; with an expert axis ``[E, d, i, j, d']`` on auxiliary cores
            the result has one.
        shape: crops the zero padding when the factors exceed the true sizes.

    Returns:
        ``[I, F]``, or ``[E, I, F]`` when any core carries an expert axis.

    Raises:
        TypeError, ValueError: cores that do not form a chain.
    """
    weights = expert_weights(fold(cores, shape=shape))
    return weights if any(core.dim() == 5 for core in cores) else weights[0]
