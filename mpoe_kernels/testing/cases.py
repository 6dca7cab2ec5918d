"""Named shapes and token distributions that tests and benchmarks share."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.mpo.fold import MPOBlocks, fold
from mpoe_kernels.mpo.shape import MPOShape

# Small relatives of every kind of shape: odd sizes, padding, edge positions of the centre, truncated bonds.
SMALL_SHAPES: dict[str, MPOShape] = {
    "paper": MPOShape((3, 2, 2, 2, 1), (2, 2, 2, 3, 2)),
    "paper_bond_4": MPOShape((3, 2, 2, 2, 1), (2, 2, 2, 3, 2), max_bond=4),
    "light": MPOShape((2, 3, 2), (2, 3, 2)),
    "separable": MPOShape((4, 3, 1), (1, 2, 5)),
    "separable_mirrored": MPOShape((4, 3, 1), (1, 2, 5)).mirrored(),
    "separable_bond_3": MPOShape((4, 3, 1), (1, 2, 5), max_bond=3),
    "padded": MPOShape((2, 3, 2), (3, 2, 2), in_features=11, out_features=10),
    "padded_separable": MPOShape((4, 3, 1), (1, 2, 5), in_features=10, out_features=9),
    "uneven_bonds": MPOShape((2, 3, 2, 2), (3, 1, 2, 2), max_bond=(2, None, 3)),
    "one_core": MPOShape((7,), (5,)),
    "centre_first": MPOShape((3, 2), (2, 4), central=0),
    "centre_last": MPOShape((3, 2, 2), (2, 1, 4), central=2),
    "seven_cores": MPOShape((2, 1, 2, 3, 1, 2, 1), (1, 2, 2, 1, 3, 1, 2)),
}

# The workloads of benchmarks: T5-base and T5-large feed-forward matrices.
WORKLOAD_SIZES = ((768, 3072), (1024, 4096))


def random_cores(
    shape: MPOShape, num_experts: int, dtype: torch.dtype = torch.float64, requires_grad: bool = False
) -> list[Tensor]:
    """Cores with entries of unit-variance products; auxiliary ones carry the expert axis."""
    cores = []
    for k, size in enumerate(shape.core_shapes):
        full = size if k == shape.central else (num_experts, *size)
        core = torch.randn(full, dtype=torch.float64) / (size[0] * size[1]) ** 0.5
        cores.append(core.to(dtype).requires_grad_(requires_grad))
    return cores


def random_blocks(
    shape: MPOShape, num_experts: int, dtype: torch.dtype = torch.float64, requires_grad: bool = False
) -> MPOBlocks:
    """Blocks as leaves, for tests of the ops themselves."""
    blocks = fold(random_cores(shape, num_experts, dtype), shape=shape, num_experts=num_experts)
    left, central, right = (
        t.detach().contiguous().requires_grad_(requires_grad) for t in (blocks.left, blocks.central, blocks.right)
    )
    return MPOBlocks(left, central, right, shape.in_features, shape.out_features, shape)


def expert_choice(kind: str, num_tokens: int, num_experts: int, top_k: int = 1) -> Tensor:
    """``[T, K]`` expert numbers: ``uniform``, ``zipf`` (weights 1/rank), ``all_to_one`` or ``some_idle``."""
    if kind == "all_to_one":
        first = torch.full((num_tokens,), num_experts - 1)
        return torch.stack([(first + k) % num_experts for k in range(top_k)], 1)
    if kind == "zipf":
        weights = 1.0 / torch.arange(1, num_experts + 1)
    elif kind == "some_idle":
        weights = (torch.arange(num_experts) % 2 == 0).double() + 1e-12
    elif kind == "uniform":
        weights = torch.ones(num_experts)
    else:
        raise ValueError(f"kind must be 'uniform', 'zipf', 'all_to_one' or 'some_idle'; got {kind!r}")
    if num_tokens == 0:
        return torch.zeros(0, top_k, dtype=torch.int64)
    return torch.multinomial(weights.expand(num_tokens, -1), top_k)
