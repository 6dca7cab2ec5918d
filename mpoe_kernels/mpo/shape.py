"""`MPOShape`: how a matrix is cut into a chain of cores. The words are those of
docs/what_is_mpoe.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from operator import mul
from typing import Any

from mpoe_kernels.checks import check_integer
from mpoe_kernels.mpo.factors import (
    balanced_factors,
    light_factors,
    paper_factors,
    separable_factors,
)

MaxBond = int | Sequence[int | None] | None


def _factor_list(name: str, factors: Sequence[int]) -> tuple[int, ...]:
    try:
        values = tuple(factors)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of integers; got {factors!r}") from None
    if not values:
        raise ValueError(f"{name} must hold at least one factor; got an empty sequence")
    for place, value in enumerate(values):
        check_integer(f"{name}[{place}]", value, 1)
    return values


def _true_size(name: str, size: int | None, factors: tuple[int, ...]) -> int:
    padded = math.prod(factors)
    if size is None:
        return padded
    return check_integer(name, size, 1, padded, f"the product of its factors {list(factors)}")


@dataclass(frozen=True)
class MPOShape:
    """Shape of a matrix product operator for a weight ``[in_features, out_features]``.

    Attributes:
        in_factors: ``i_k`` for every core; their product is at least ``in_features`` (zero padding
            at the end).
        out_factors: ``j_k`` for every core; their product is at least ``out_features``.
        max_bond: cap of the inner bond dimensions: ``None`` (full bonds), one integer for all, or
            one entry (integer or ``None``) for each of the ``n - 1`` inner bonds.
        central: index of the central core; ``None`` selects the middle one, ``n // 2``.
        in_features: true number of input features; ``None`` = product of ``in_factors``.
        out_features: true number of output features; ``None`` = product of ``out_factors``.

    Raises:
        TypeError, ValueError: a factor, bond, index or size that does not fit, named in the
            message.
    """

    in_factors: tuple[int, ...]
    out_factors: tuple[int, ...]
    max_bond: Any = None
    central: int = field(default=None)  # type: ignore[assignment]
    in_features: int = field(default=None)  # type: ignore[assignment]
    out_features: int = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        set_field = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 - frozen dataclass
        in_factors = _factor_list("in_factors", self.in_factors)
        out_factors = _factor_list("out_factors", self.out_factors)
        if len(in_factors) != len(out_factors):
            raise ValueError(
                "in_factors and out_factors must have the same length (one entry per core); "
                f"got {list(in_factors)} and {list(out_factors)}"
            )
        set_field("in_factors", in_factors)
        set_field("out_factors", out_factors)
        set_field("in_features", _true_size("in_features", self.in_features, in_factors))
        set_field("out_features", _true_size("out_features", self.out_features, out_factors))
        set_field("max_bond", self._checked_max_bond())
        central = self.central
        if self.central is None:
            central = len(in_factors) // 2
        last = len(in_factors) - 1
        check_integer("central", central, 0, last, f"the last of {last + 1} cores")
        set_field("central", central)

    def _checked_max_bond(self) -> int | tuple[int | None, ...] | None:
        caps = self.max_bond
        if caps is None:
            return None
        if isinstance(caps, int):
            return check_integer("max_bond", caps, 1)
        if isinstance(caps, str) or not isinstance(caps, Sequence):
            raise TypeError(
                f"max_bond must be None, an integer or a sequence of them; got {caps!r}"
            )
        inner = len(self.in_factors) - 1
        if len(caps) != inner:
            raise ValueError(
                f"max_bond must have one entry per inner bond ({inner} for {inner + 1} cores); "
                f"got {list(caps)}"
            )
        for place, cap in enumerate(caps):
            if cap is not None:
                check_integer(f"max_bond[{place}]", cap, 1)
        return tuple(caps)

    # ---------------------------------------------------------------- sizes

    @property
    def num_cores(self) -> int:
        return len(self.in_factors)

    @property
    def padded_in(self) -> int:
        return math.prod(self.in_factors)

    @property
    def padded_out(self) -> int:
        return math.prod(self.out_factors)

    @cached_property
    def factor_products(self) -> tuple[int, ...]:
        """``i_k j_k`` of every core."""
        return tuple(map(mul, self.in_factors, self.out_factors))

    @cached_property
    def full_bond_dims(self) -> tuple[int, ...]:
        """Full bonds ``(1, d_1, ..., d_{n-1}, 1)``: the smaller product of ``i * j`` on either
        side."""
        sizes = self.factor_products
        bonds = [1]
        for k in range(1, self.num_cores):
            before = math.prod(sizes[:k])
            after = math.prod(sizes[k:])
            bonds.append(min(before, after))
        return (*bonds, 1)

    @cached_property
    def bond_dims(self) -> tuple[int, ...]:
        """Bonds ``(1, d_1, ..., d_{n-1}, 1)`` after the caps: ``min(max_bond_k, full_k)``, as in
        the original.

        With different caps per bond a small one also bounds its neighbours: a bond never exceeds
        what the neighbouring core can carry, ``d_{k-1} i_k j_k`` or ``i_{k+1} j_{k+1} d_{k+1}``.
        """
        caps = self.max_bond
        inner = self.num_cores - 1
        per_bond = caps
        if not isinstance(caps, tuple):
            per_bond = (caps,) * inner
        bonds = list(self.full_bond_dims)
        for k, cap in enumerate(per_bond, start=1):
            if cap is not None:
                bonds[k] = min(cap, bonds[k])
        sizes = self.factor_products
        for k in range(1, self.num_cores):
            bonds[k] = min(bonds[k], bonds[k - 1] * sizes[k - 1])
        for k in range(self.num_cores - 1, 0, -1):
            bonds[k] = min(bonds[k], sizes[k] * bonds[k + 1])
        return tuple(bonds)

    @property
    def is_full(self) -> bool:
        """Whether no bond is truncated, so that every matrix is represented exactly."""
        return self.bond_dims == self.full_bond_dims

    @cached_property
    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shape ``(d_{k-1}, i_k, j_k, d_k)`` of every core."""
        bonds = self.bond_dims
        sides = zip(bonds, self.in_factors, self.out_factors, bonds[1:], strict=False)
        return tuple(sides)

    @cached_property
    def block_dims(self) -> dict[str, int]:
        """Sizes ``iL, jL, a, iC, jC, b, iR, jR`` of the folded blocks."""
        c = self.central
        return {
            "iL": math.prod(self.in_factors[:c]),
            "jL": math.prod(self.out_factors[:c]),
            "a": self.bond_dims[c],
            "iC": self.in_factors[c],
            "jC": self.out_factors[c],
            "b": self.bond_dims[c + 1],
            "iR": math.prod(self.in_factors[c + 1 :]),
            "jR": math.prod(self.out_factors[c + 1 :]),
        }

    @property
    def is_separable(self) -> bool:
        """Left cores act on the input only and right cores on the output only: ``y =
        right(central(left x))``."""
        dims = self.block_dims
        return dims["jL"] == 1 and dims["iR"] == 1

    # ----------------------------------------------------------- parameters

    @property
    def central_parameters(self) -> int:
        """Elements of the central core; a layer has one."""
        return math.prod(self.core_shapes[self.central])

    @property
    def auxiliary_parameters(self) -> int:
        """Elements of one expert's auxiliary cores."""
        return sum(math.prod(s) for k, s in enumerate(self.core_shapes) if k != self.central)

    def parameters(self, num_experts: int = 1) -> int:
        """Elements of ``num_experts`` experts that share the central core."""
        check_integer("num_experts", num_experts, 1)
        return self.central_parameters + num_experts * self.auxiliary_parameters

    @property
    def compression_ratio(self) -> float:
        """``sum_k d_{k-1} i_k j_k d_k / (I F)``: elements of the cores of one matrix divided by its
        own elements."""
        return self.parameters() / (self.in_features * self.out_features)

    # --------------------------------------------------------- constructors

    @classmethod
    def automatic(
        cls,
        in_features: int,
        out_features: int,
        num_cores: int = 5,
        *,
        max_bond: MaxBond = None,
        central: int | None = None,
    ) -> MPOShape:
        """Balanced factors for any size; see `mpoe_kernels.mpo.factors.balanced_factors`."""
        return cls(
            balanced_factors(in_features, num_cores, "in_features"),
            balanced_factors(out_features, num_cores, "out_features"),
            max_bond,
            central,  # type: ignore[arg-type]
            in_features,
            out_features,
        )

    @classmethod
    def paper(cls, in_features: int, out_features: int, *, max_bond: MaxBond = None) -> MPOShape:
        """The five factors the original uses for its sizes (Gao et al., COLING 2022), balanced ones
        elsewhere."""
        in_factors, out_factors = paper_factors(in_features, out_features)
        return cls(in_factors, out_factors, max_bond, None, in_features, out_features)  # type: ignore[arg-type]

    @classmethod
    def light(
        cls, in_features: int, out_features: int, p: int = 64, *, max_bond: MaxBond = None
    ) -> MPOShape:
        """Three cores whose outer products of ``i * j`` are about ``p``: auxiliary cores hold about
        ``2 p^2``."""
        in_factors, out_factors = light_factors(in_features, out_features, p)
        return cls(in_factors, out_factors, max_bond, 1, in_features, out_features)

    @classmethod
    def separable(
        cls,
        in_features: int,
        out_features: int,
        left: int | None = None,
        right: int | None = None,
        *,
        max_bond: MaxBond = None,
    ) -> MPOShape:
        """``(left, I/left, 1) x (1, F/right, right)``: ``y = right_e(central(left_e x))``, lossless
        at full bonds.

        ``left`` and ``right`` default to about 256 on the smaller side of the matrix and 64 on the
        larger one (scaled down for small matrices); they must divide the sizes.
        """
        in_factors, out_factors = separable_factors(in_features, out_features, left, right)
        return cls(in_factors, out_factors, max_bond, 1, in_features, out_features)

    def mirrored(self) -> MPOShape:
        """The shape of the opposite projection: a weight ``[out_features, in_features]``.

        A separable shape stays separable: its left (input) factor becomes the new right (output)
        factor. Any other shape swaps the roles of its factors core by core.
        """
        step = 1
        caps = self.max_bond
        central = self.central
        if self.is_separable and self.num_cores > 1:
            step = -1
            if isinstance(caps, tuple):
                caps = caps[::step]
            central = self.num_cores - 1 - central
        return MPOShape(
            self.out_factors[::step],
            self.in_factors[::step],
            caps,
            central,
            self.out_features,
            self.in_features,
        )

    # -------------------------------------------------------- serialisation

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` reads it back to an equal shape."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MPOShape:
        """Inverse of `to_dict`; unknown or missing keys are refused."""
        if not isinstance(values, Mapping):
            raise TypeError(
                f"an MPOShape is described by a mapping; got {type(values).__name__} {values!r}"
            )
        known = {part.name for part in fields(cls)}
        unknown = set(values) - known
        missing = {"in_factors", "out_factors"} - set(values)
        if unknown or missing:
            raise ValueError(
                f"an MPOShape has the keys {sorted(known)}; unknown: {sorted(unknown)}, missing: "
                f"{sorted(missing)}"
            )
        return cls(**values)

    def __str__(self) -> str:
        chain = " ".join(f"[{d},{i},{j},{e}]" for d, i, j, e in self.core_shapes)
        return f"MPO {self.in_features}x{self.out_features}: {chain}, central {self.central}"
