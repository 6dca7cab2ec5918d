"""From cores back to the matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpoe_kernels.checks import check_device, check_plain_memory
from mpoe_kernels.mpo.fold import MPOBlocks, check_blocks, fold
from mpoe_kernels.mpo.shape import MPOShape


def expert_weights(blocks: MPOBlocks) -> Tensor:
    """All experts' weights ``[E, I, F]``: for inspection and export, never on the fast path.
    Differentiable.

    Raises:
        TypeError: ``blocks`` is not an `MPOBlocks`, or of several dtypes outside of autocast.
        ValueError: its tensors are on several devices, or without their memory.
    """
    check_blocks("blocks", blocks)
    left = blocks.left
    central = blocks.central
    right = blocks.right
    check_device("left", left, central=central, right=right)
    check_plain_memory("left", left)
    check_plain_memory("central", central)
    check_plain_memory("right", right)
    dtypes = {part.dtype for part in (left, central, right)}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(left.device.type):
        raise TypeError(f"left, central and right must be of one dtype; got {dtypes}")
    experts, rows_l, columns_l, _ = left.shape
    _, rows_c, columns_c, bond = central.shape
    _, _, rows_r, columns_r = right.shape
    half = left.flatten(1, 2) @ central.flatten(1)
    half = half.reshape(experts, -1, bond)
    full = half @ right.flatten(2)
    full = full.view(experts, rows_l, columns_l, rows_c, columns_c, rows_r, columns_r)
    # -> [E, iL, iC, iR, jL, jC, jR]
    full = full.permute(0, 1, 3, 5, 2, 4, 6)
    padded = full.flatten(4).flatten(1, 3)
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
    if any(core.dim() == 5 for core in cores):
        return weights
    return weights[0]
