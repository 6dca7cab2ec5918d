"""The algebra of matrix product operators in plain torch."""

from mpoe_kernels.mpo.decompose import Decomposition, decompose, decompose_with_errors
from mpoe_kernels.mpo.fold import MPOBlocks, fold
from mpoe_kernels.mpo.reconstruct import expert_weights, reconstruct
from mpoe_kernels.mpo.shape import MPOShape

__all__ = [
    "Decomposition",
    "MPOBlocks",
    "MPOShape",
    "decompose",
    "decompose_with_errors",
    "expert_weights",
    "fold",
    "reconstruct",
]
