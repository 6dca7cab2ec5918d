"""How much each bond of an expert's matrix carries: singular values across the bond, from the cores alone.

Cutting the chain at a bond splits the matrix into ``L R`` with ``L [rows left of it, d]`` and ``R [d, columns]``; the
squared singular values of the product are the eigenvalues of ``(L^T L)(R R^T)``. Both Gram matrices grow core by core,
so the matrix itself is never built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpoe.layers.cores import MPOCores


@dataclass(frozen=True)
class BondSpectrum:
    """One bond of every expert's matrix.

    Attributes:
        singular_values: descending, float64 ``[E, d]``.
    """

    singular_values: Tensor

    @property
    def dimension(self) -> int:
        return self.singular_values.shape[1]

    @property
    def entropy(self) -> Tensor:
        """Entanglement entropy ``-sum p ln p`` of ``p = s^2 / sum s^2``, in nats, ``[E]``; at most ``ln d``."""
        squared = self.singular_values.square()
        p = squared / squared.sum(-1, keepdim=True).clamp_min(torch.finfo(squared.dtype).tiny)
        return -torch.xlogy(p, p).sum(-1)

    @property
    def effective_rank(self) -> Tensor:
        """``exp(entropy)``, ``[E]``: how many of the d directions carry weight; d if all carry the same."""
        return self.entropy.exp()

    @property
    def used(self) -> float:
        """Effective rank as a fraction of the bond dimension, mean over experts: ``1/d`` to 1."""
        return float(self.effective_rank.mean()) / self.dimension


@torch.no_grad()
def bond_spectra(cores: MPOCores) -> list[BondSpectrum]:
    """Spectra at the inner bonds of a weight, in chain order (none for a chain of one core).

    Args:
        cores: of E experts.
    """
    per_expert = [_chain_spectra(_chain(cores, expert)) for expert in range(cores.num_experts)]
    return [BondSpectrum(torch.stack(values)) for values in zip(*per_expert, strict=True)]


def _chain(cores: MPOCores, expert: int) -> list[Tensor]:
    """One expert's cores as ``[d, i j, d']``, float64."""
    own = [core[expert] if core.dim() == 5 else core for core in cores.cores()]
    return [core.double().flatten(1, 2) for core in own]


def _chain_spectra(chain: list[Tensor]) -> list[Tensor]:
    """Singular values at every inner bond, descending."""
    rights = [chain[-1].new_ones(1, 1)]
    for core in reversed(chain[1:]):
        rows = core.flatten(1)  # [d, (i j) d']
        rights.append((core @ rights[-1]).flatten(1) @ rows.T)
    left, found = chain[0].new_ones(1, 1), []
    for core, right in zip(chain[:-1], reversed(rights[1:]), strict=True):
        columns = core.flatten(0, 1)  # [d (i j), d']
        left = columns.T @ torch.tensordot(left, core, 1).flatten(0, 1)
        values, vectors = torch.linalg.eigh(left)
        root = vectors * values.clamp_min(0).sqrt()  # root root^T = left
        squared = torch.linalg.eigvalsh(root.T @ right @ root)
        found.append(squared.clamp_min(0).sqrt().flip(0))
    return found
