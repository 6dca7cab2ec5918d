"""From E matrices to E chains of cores around one centre: alternating least squares.

Experts that share their central core cannot represent arbitrary E matrices, so the centre and the auxiliary cores that
fit them best are searched for. Every step solves for one core exactly while the others are fixed (as in the alternating
scheme for tensor trains, Holtz, Rohwedder and Schneider 2012), so the error never grows. The final error depends on the
matrices; it is reported, and nothing is guaranteed about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpoe_kernels.checks import check_floating, check_integer, check_memory, check_tensor, describe, no_autocast
from mpoe_kernels.mpo.decompose import _interleave, decompose_with_errors
from mpoe_kernels.mpo.shape import MPOShape

# The search ends when a sweep reduces the error by less than this share, or at an error below float32 rounding.
LEAST_GAIN, ROUNDING = 1e-3, 1e-7
_CENTRE_STEPS = 10  # of conjugate gradients; the centre is warm and its equations are well conditioned


@dataclass(frozen=True)
class SharedDecomposition:
    """Cores of E matrices that share the central core, and how well they fit.

    Attributes:
        cores: in chain order; the central one ``[d, i, j, d']``, auxiliary ones ``[E, d, i, j, d']``.
        shape: the shape they follow.
        expert_errors: for every matrix ``||W_e - MPO_e||_F / ||W_e||_F``.
        error: ``sqrt(sum_e ||W_e - MPO_e||_F^2)``.
        norm: Frobenius norm of all matrices together.
        sweeps: rounds over all cores.
    """

    cores: tuple[Tensor, ...]
    shape: MPOShape
    expert_errors: tuple[float, ...]
    error: float
    norm: float
    sweeps: int
    local_errors: tuple[float, ...] = ()  # no bond is truncated on its own

    @property
    def error_bound(self) -> float:
        """The error itself, under the name of the bound in `Decomposition`."""
        return self.error

    @property
    def relative_error_bound(self) -> float:
        """The error divided by the norm; 0 for zero matrices."""
        return self.error / self.norm if self.norm else 0.0


class _Chains:
    """E chains ``[E, d, s, d']`` around one centre ``[d, s, d']`` (s = i j), and the matrices they approximate."""

    def __init__(self, targets: Tensor, start: Sequence[Tensor], shape: MPOShape) -> None:
        self.targets, self.centre, self.count = targets, shape.central, len(targets)
        self.sizes = [i * j for i, j in zip(shape.in_factors, shape.out_factors, strict=True)]
        flat = [core.reshape(core.shape[0], -1, core.shape[-1]) for core in start]
        self.cores = [
            core if k == self.centre else core.expand(self.count, -1, -1, -1).clone() for k, core in enumerate(flat)
        ]

    def _core(self, k: int) -> Tensor:
        core = self.cores[k]
        return core.expand(self.count, -1, -1, -1) if k == self.centre else core

    def left(self, k: int) -> Tensor:
        """Product of the cores before k, ``[E, P, d]``."""
        product = self.targets.new_ones(self.count, 1, 1)
        for place in range(k):
            product = torch.einsum("epa,easb->epsb", product, self._core(place)).flatten(1, 2)
        return product

    def right(self, k: int) -> Tensor:
        """Product of the cores after k, ``[E, d', Q]``."""
        product = self.targets.new_ones(self.count, 1, 1)
        for place in range(len(self.cores) - 1, k, -1):
            product = torch.einsum("easb,ebq->easq", self._core(place), product).flatten(2)
        return product

    def _equations(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gram matrices ``[E, d, d]`` and ``[E, d', d']`` of the two sides of core k, and the right-hand side of the
        equations."""
        left, right = self.left(k), self.right(k)
        target = self.targets.reshape(self.count, left.shape[1], self.sizes[k], right.shape[2])
        projected = torch.einsum("epa,epsq->easq", left, target)
        return left.mT @ left, right @ right.mT, torch.einsum("easq,ebq->easb", projected, right)

    def fit_auxiliary(self, k: int) -> None:
        """The best core k of every expert."""
        before, after, wanted = self._equations(k)
        solved = torch.einsum("exa,easb->exsb", torch.linalg.pinv(before, hermitian=True), wanted)
        self.cores[k] = torch.einsum("exsb,eby->exsy", solved, torch.linalg.pinv(after, hermitian=True))

    def fit_centre(self) -> None:
        """The best centre for all experts together, by conjugate gradients.

        Both of its bonds are put into a gauge in which the experts' sides are orthonormal on average, so the equations
        are close to diagonal.
        """
        k = self.centre
        before, after, wanted = self._equations(k)
        (root_l, inverse_l), (root_r, inverse_r) = _roots(before.mean(0)), _roots(after.mean(0))
        if k > 0:
            self.cores[k - 1] = self.cores[k - 1] @ inverse_l
        if k + 1 < len(self.cores):
            self.cores[k + 1] = torch.einsum("xa,easb->exsb", inverse_r, self.cores[k + 1])
        before, after = inverse_l @ before @ inverse_l, inverse_r @ after @ inverse_r
        total = torch.einsum("xa,easb,by->xsy", inverse_l, wanted, inverse_r)
        centre = torch.einsum("xa,asb,by->xsy", root_l, self.cores[k], root_r)

        def applied(value: Tensor) -> Tensor:
            half = torch.einsum("exa,asb->exsb", before, value)
            return torch.einsum("exsb,eby->xsy", half, after)

        rest = total - applied(centre)
        direction, size, enough = rest, float(rest.square().sum()), 1e-24 * float(total.square().sum())
        for _ in range(_CENTRE_STEPS):
            if size <= enough:
                break
            image = applied(direction)
            step = size / float((direction * image).sum())
            centre, rest = centre + step * direction, rest - step * image
            smaller = float(rest.square().sum())
            direction, size = rest + smaller / size * direction, smaller
        self.cores[k] = centre

    def squared_errors(self, counted: Tensor | None = None) -> Tensor:
        """``||W_e - MPO_e||_F^2`` of every expert ``[E]``; ``counted`` leaves out the padding."""
        k = self.centre
        half = torch.einsum("epa,asb->epsb", self.left(k), self.cores[k])
        found = torch.einsum("epsb,ebq->epsq", half, self.right(k))
        squares = (found.reshape(self.count, -1) - self.targets).square()
        return squares.sum(1) if counted is None else (squares * counted).sum(1)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a positive matrix, and its inverse; null directions keep a floor."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(max(float(values[-1]), 1e-300) * 1e-12).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


@torch.no_grad()
def decompose_shared(weights: Tensor, shape: MPOShape, sweeps: int = 50) -> SharedDecomposition:
    """Decompose E matrices, approximately, into chains that share their central core.

    The search starts from the decomposition of the largest matrix and is computed in float64.

    Args:
        weights: ``[E, in_features, out_features]``, floating.
        shape: of every chain.
        sweeps: maximum number of sweeps; the search ends earlier if a sweep gains less than a thousandth.

    Returns:
        The cores in the weights' dtype and on their device, with the error of every matrix.

    Raises:
        TypeError: weights that are not a floating tensor, a shape that is not an `MPOShape`.
        ValueError: sizes that differ from the shape's, NaN or Inf, weights without values, ``sweeps`` below 1.
    """
    check_tensor("weights", weights, ("E", "I", "F"))
    check_floating("weights", weights)
    check_memory("weights", weights)
    check_integer("sweeps", sweeps, 1)
    if not isinstance(shape, MPOShape):
        raise TypeError(f"shape must be an MPOShape; got {type(shape).__name__}")
    if weights.shape[0] < 1 or tuple(weights.shape[1:]) != (shape.in_features, shape.out_features):
        raise ValueError(
            f"weights must be [E, in_features, out_features] = [E, {shape.in_features}, {shape.out_features}] with "
            f"E >= 1; got {list(weights.shape)}"
        )
    if weights.device.type == "meta":
        raise ValueError(f"weights must have values to decompose; got {describe(weights)}")
    work = weights.detach().double()
    if not bool(torch.isfinite(work).all()):
        raise ValueError("weights must be finite; they hold NaN or Inf")
    with no_autocast(work.device):
        return _search(work, weights.dtype, shape, sweeps)


def _search(work: Tensor, dtype: torch.dtype, shape: MPOShape, sweeps: int) -> SharedDecomposition:
    largest = float(work.abs().max()) or 1.0
    work = work / largest  # for some float64 weights, squares of large numbers would exceed float64's range
    targets = torch.stack([_interleave(weight, shape).reshape(-1) for weight in work])
    norms = targets.square().sum(1)
    # The mean would do as well, unless it vanishes.
    start = decompose_with_errors(work[int(norms.argmax())], shape, "orthogonal").cores
    chains = _Chains(targets, start, shape)
    centre, last = shape.central, shape.num_cores - 1
    squared, done = chains.squared_errors(), 0
    while done < sweeps and float(squared.sum()) > ROUNDING**2 * float(norms.sum()):
        for k in (*range(centre), *range(last, centre, -1)):
            chains.fit_auxiliary(k)
        chains.fit_centre()
        before, squared, done = float(squared.sum()), chains.squared_errors(), done + 1
        if float(squared.sum()) > (1 - LEAST_GAIN) ** 2 * before:
            break
    squared = chains.squared_errors(_interleave(torch.ones_like(work[0]), shape).reshape(-1))
    cores = [
        core.reshape(*core.shape[:-3], *shape.core_shapes[k]) * (largest if k == centre else 1.0)
        for k, core in enumerate(chains.cores)
    ]
    relative = [math.sqrt(float(s / n)) if float(n) else 0.0 for s, n in zip(squared, norms, strict=True)]
    return SharedDecomposition(
        tuple(core.to(dtype).contiguous() for core in cores),
        shape,
        tuple(relative),
        largest * math.sqrt(float(squared.sum())),
        largest * math.sqrt(float(norms.sum())),
        done,
    )
