"""From a matrix to its cores.

Method: tensor-train SVD of the interleaved matrix (Oseledets 2011; Gao et al., COLING 2022, section
3.1), swept from both ends towards the central core. Only the bonds next to the centre are large, so
no step needs a full SVD: the orthonormal basis of a bond is found from the Gram matrix of the
unfolding's short side, accumulated in float64. Every step is an orthogonal projection of the
previous step's result, hence the squared local errors add up to the squared total error, and no
truncation is worse than truncating all bonds at once in the symmetric gauge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpoe_kernels.checks import (
    check_choice,
    check_floating,
    check_memory,
    check_tensor,
    describe,
    no_autocast,
)
from mpoe_kernels.mpo.shape import MPOShape

# Entries from 2^60 on are scaled to about 2^30: norms of entries below it stay inside float32's
# range, 2^128.
RANGE_EXPONENT = 60
GAUGES = ("symmetric", "orthogonal", "identity")


@dataclass(frozen=True)
class Decomposition:
    """Cores of a matrix and what truncation cost.

    Attributes:
        cores: ``[d_{k-1}, i_k, j_k, d_k]`` in chain order.
        shape: the shape of the chain.
        local_errors: for each inner bond, the root of the sum of its dropped squared singular
            values.
        norm: Frobenius norm of the matrix.
    """

    cores: tuple[Tensor, ...]
    shape: MPOShape
    local_errors: tuple[float, ...]
    norm: float

    @property
    def error_bound(self) -> float:
        """``sqrt(sum_k eps_k^2) >= ||W - MPO(W)||_F``, up to rounding."""
        return math.sqrt(sum(error * error for error in self.local_errors))

    @property
    def relative_error_bound(self) -> float:
        """The bound over ``||W||_F``; 0 for a zero matrix."""
        if self.norm:
            return self.error_bound / self.norm
        return 0.0


def _short_side_basis(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Leading left singular vectors of ``matrix [m, n]``.

    Returns:
        ``basis [m, rank]`` with orthonormal columns, ``singular [rank]`` (float64), dropped
        ``eps``.
    """
    rows, columns = matrix.shape
    if rows <= columns and matrix.dtype != torch.float64:
        # float64 products of float32 entries: singular values down to 1e-8 of the largest are
        # resolved, below what float32 can hold; and the basis is orthonormal whatever the rank.
        wide = matrix.double()
        squared, basis = torch.linalg.eigh(wide @ wide.T)
        squared = squared.flip(0).clamp_min(0)
        basis = basis.flip(1)
    else:
        basis, singular, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
        squared = singular.square()
    dropped = math.sqrt(float(squared[rank:].sum()))
    return basis[:, :rank].to(matrix.dtype), squared[:rank].sqrt(), dropped


def _gauge_scale(singular: Tensor, dtype: torch.dtype) -> Tensor:
    """Square roots of the singular values, bounded away from zero.

    Any positive scale is a valid gauge (it is divided out on the other side of the bond), so null
    directions of a rank-deficient or zero matrix get the floor instead of a division by zero.
    """
    largest = float(singular.max())
    if largest == 0.0:
        return torch.ones_like(singular)
    return singular.clamp_min(largest * torch.finfo(dtype).eps).sqrt()


def _interleave(weight: Tensor, shape: MPOShape) -> Tensor:
    """``[I, F] -> [i_1 j_1, i_2 j_2, ..., i_n j_n]``, zero-padded at the end where the factors
    exceed the sizes."""
    more_rows = shape.padded_in - shape.in_features
    more_columns = shape.padded_out - shape.out_features
    padded = torch.nn.functional.pad(weight, (0, more_columns, 0, more_rows))
    n = shape.num_cores
    order = []
    for k in range(n):
        order += [k, n + k]
    return padded.reshape(*shape.in_factors, *shape.out_factors).permute(order)


def _identity_cores(interleaved: Tensor, shape: MPOShape) -> list[Tensor]:
    """Identity cores around the weight's own entries: every outer bond only enumerates the factors
    outside it."""
    cores = []
    for k, (before, i, j, after) in enumerate(shape.core_shapes):
        if k == shape.central:
            cores.append(interleaved.reshape(before, i, j, after).clone())
            continue
        inner = before
        product = i * j * after
        if k < shape.central:
            inner = after
            product = before * i * j
        if inner != product:
            raise ValueError(
                "gauge 'identity' needs bonds equal to the product of the factors on their outer "
                f"side; core {k} of {shape} has {inner}, not {product}"
            )
        eye = torch.eye(product, dtype=interleaved.dtype, device=interleaved.device)
        cores.append(eye.reshape(before, i, j, after))
    return cores


@torch.no_grad()
def decompose_with_errors(
    weight: Tensor, shape: MPOShape, gauge: str = "symmetric"
) -> Decomposition:
    """Decompose ``weight`` and report the error of every bond.

    Args:
        weight: ``[in_features, out_features]``, floating; float16 and bfloat16 are computed in
            float32.
        shape: factors, bonds and central core; sizes beyond the true ones are padded with zeros.
        gauge: ``"symmetric"`` puts the square root of each bond's singular values on both of its
            sides, as the original does; ``"orthogonal"`` makes auxiliary cores orthonormal and puts
            all scale into the central core; ``"identity"`` makes auxiliary cores identities and
            puts the weight's own entries into the central core.

    Returns:
        The cores in the weight's dtype and on its device, with local errors.

    Raises:
        TypeError: a weight that is not a floating matrix, a shape that is not an `MPOShape`.
        ValueError: sizes that differ from the shape's, NaN or Inf in the weight, a weight without
            values (on the meta device) or so large that its cores exceed the range of its dtype, an
            unknown gauge, or, for the gauge ``"identity"``, a bond below the product of the factors
            between it and the end of the chain.
    """
    check_tensor("weight", weight, ("I", "F"))
    check_floating("weight", weight)
    check_memory("weight", weight)
    if not isinstance(shape, MPOShape):
        raise TypeError(f"shape must be an MPOShape; got {type(shape).__name__}")
    if tuple(weight.shape) != (shape.in_features, shape.out_features):
        raise ValueError(
            f"weight must be [in_features, out_features] = [{shape.in_features}, "
            f"{shape.out_features}]; got {list(weight.shape)}"
        )
    check_choice("gauge", gauge, GAUGES)
    if weight.device.type == "meta":
        raise ValueError(f"weight must have values to decompose; got {describe(weight)}")
    work = weight.detach()
    if work.dtype != torch.float64:
        work = work.float()
    if not bool(torch.isfinite(work).all()):
        raise ValueError("weight must be finite; it holds NaN or Inf")
    with no_autocast(work.device):
        decomposition = _decompose(work, shape, gauge)
    cores = tuple(core.to(weight.dtype).contiguous() for core in decomposition.cores)
    if not all(bool(torch.isfinite(core).all()) for core in cores):
        raise ValueError(
            f"weight is too large: with the gauge {gauge!r} its cores pass the range of "
            f"{weight.dtype}; its norm is {decomposition.norm:.3g}"
        )
    return replace(decomposition, cores=cores)


def _range_scale(work: Tensor) -> float:
    """A power of 4 that scales a matrix near the limit of its dtype's range so that sums stay in
    range; otherwise 1."""
    exponent = math.frexp(float(work.abs().max()))[1]
    if exponent > RANGE_EXPONENT:
        return 4.0 ** ((exponent - RANGE_EXPONENT // 2) // 2)
    return 1.0


def _decompose(work: Tensor, shape: MPOShape, gauge: str) -> Decomposition:
    """Decompose a finite matrix in its own dtype."""
    scale = _range_scale(work)
    if scale != 1.0:
        work = work / scale
    norm = float(work.norm()) * scale
    n = shape.num_cores
    centre = shape.central
    bonds = shape.bond_dims
    sizes = shape.factor_products
    remainder = _interleave(work, shape).reshape(-1)
    if gauge == "identity":
        return Decomposition(
            tuple(_identity_cores(remainder * scale, shape)), shape, (0.0,) * (n - 1), norm
        )
    cores: list[Tensor] = [remainder] * n
    scales: list[Tensor] = [remainder.new_ones(1)] * (n + 1)
    local_errors = [0.0] * (n - 1)

    for k in range(centre):
        unfolding = remainder.reshape(bonds[k] * sizes[k], -1)
        basis, singular, local_errors[k] = _short_side_basis(unfolding, bonds[k + 1])
        cores[k] = basis
        scales[k + 1] = _gauge_scale(singular, work.dtype).to(work.dtype)
        remainder = basis.T @ unfolding
    for k in range(n - 1, centre, -1):
        unfolding = remainder.reshape(-1, sizes[k] * bonds[k + 1])
        basis, singular, local_errors[k - 1] = _short_side_basis(unfolding.T, bonds[k])
        cores[k] = basis.T
        scales[k] = _gauge_scale(singular, work.dtype).to(work.dtype)
        remainder = unfolding @ basis
    cores[centre] = remainder

    # Every bond's singular values are those of the scaled matrix: each side of a bond takes the
    # square root of the scale.
    root = math.sqrt(scale)
    finished = []
    for k, core in enumerate(cores):
        core = core.reshape(shape.core_shapes[k])
        if gauge == "symmetric":
            # Orthonormal cores left of the centre carry no scale: they are multiplied by the root
            # of their right bond and divided by that of their left one; right of the centre it is
            # the other way round; the centre is divided by both.
            before = scales[k] if k > centre else 1 / scales[k]
            after = scales[k + 1] if k < centre else 1 / scales[k + 1]
            core = core * before.reshape(-1, 1, 1, 1) * after
            inner = (k > 0) + (k + 1 < n)
            factor = root ** (2 - inner)
            if k == centre:
                factor = scale / root**inner
            core = core * factor
        elif k == centre:
            core = core * scale
        finished.append(core)
    return Decomposition(
        tuple(finished), shape, tuple(error * scale for error in local_errors), norm
    )


def decompose(weight: Tensor, shape: MPOShape, gauge: str = "symmetric") -> list[Tensor]:
    """Cores ``[d, i, j, d']`` of ``weight [I, F]``; see `decompose_with_errors` for arguments and
    errors raised."""
    return list(decompose_with_errors(weight, shape, gauge).cores)
