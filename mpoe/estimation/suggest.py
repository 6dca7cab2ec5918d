"""Finds shapes that meet a budget: a small grid of separable, light and paper shapes, counted as a plan counts them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mpoe.config import NAMED_SHAPES, MPOEConfig
from mpoe.estimation.costs import ModelCosts, Usage, model_costs
from mpoe.estimation.inventory import Inventory

RANKS = ("capacity", "flops", "parameters")
_SIZES = (8, 16, 32, 64, 128, 256, 512)  # of a separable shape's outer cores, and of light's products
_BONDS = (128, 64, 32, 16, 8)
_PER_FAMILY = {True: 5, False: 2}  # lossless; truncated
_LEAST_CAPACITY = 0.001  # fraction of a dense layer: experts that own less cannot become different
# A chain with fewer than half of a matrix's numbers loses most of an unstructured one: for n x n, the largest .29 n
# singular values, which need half of the numbers, hold two thirds of the energy.
_LEAST_HELD = 0.5


@dataclass(frozen=True)
class Suggestion:
    """A shape and its cost.

    Attributes:
        options: flags of ``mpoe plan`` and ``mpoe convert`` that select it.
        costs: costs of the whole model.
        capacity: auxiliary parameters of one expert relative to the elements of a dense feed-forward layer.
        held: parameters of one expert's chains, including central cores, relative to the elements of a dense layer.
    """

    options: str
    costs: ModelCosts
    capacity: float
    held: float = 1.0

    @property
    def name(self) -> str:
        """``separable left/right``, ``light p`` or ``paper``, with its bond when truncated."""
        config = self.costs.config
        sides = f" {config.separable_left}/{config.separable_right}" if config.separable_left else ""
        light = f" {config.light_p}" if config.shape == "light" else ""
        return f"{config.shape}{sides}{light}" + (f", bond {config.max_bond}" if config.max_bond else "")

    @property
    def worthwhile(self) -> bool:
        """Whether its experts own enough parameters and its chain can hold a pretrained matrix."""
        return self.capacity >= _LEAST_CAPACITY and (self.costs.lossless or self.held >= _LEAST_HELD)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.costs.whole("mpoe").parameters

    @property
    def x_dense(self) -> float:
        """FLOPs of the feed-forward layers over the dense ones'; 0 without tokens."""
        dense = self.costs.experts("dense").flops
        return self.costs.experts("mpoe").flops / dense if dense else 0.0


@dataclass(frozen=True)
class Limits:
    """Upper bounds; None = unbounded.

    Attributes:
        parameters: of the whole model.
        x_dense: FLOPs of the feed-forward layers over those of the dense ones on the same tokens.
    """

    parameters: int | None = None
    x_dense: float | None = None

    def excess(self, suggestion: Suggestion) -> float:
        """Factor by which the worse bound is exceeded; at most 1 = met."""
        ratios = [0.0]
        if self.parameters is not None:
            ratios.append(suggestion.parameters / self.parameters)
        if self.x_dense is not None:
            ratios.append(suggestion.x_dense / self.x_dense)
        return max(ratios)


def _near_divisors(size: int) -> list[int]:
    """Divisors of ``size`` nearest to `_SIZES` that leave the central core more than one feature."""
    divisors = [d for d in range(1, size + 1) if size % d == 0 and d < size]
    chosen = {min(divisors, key=lambda d: (abs(math.log(d / wanted)), d)) for wanted in _SIZES if wanted < size}
    return sorted(chosen)


def _configurations(inventory: Inventory, base: MPOEConfig) -> Iterator[tuple[str, MPOEConfig]]:
    """Flags and configurations of the grid."""
    plain = replace(base, shape="separable", max_bond=None, separable_left=None, separable_right=None)
    rows = math.gcd(*(layer.matrices[0].rows for layer in inventory.layers))
    columns = math.gcd(*(layer.matrices[0].columns for layer in inventory.layers))
    for left in _near_divisors(rows):
        for right in _near_divisors(columns):
            options = f"--shape separable --separable_left {left} --separable_right {right}"
            yield options, replace(plain, separable_left=left, separable_right=right)
    for bond in (None, *_BONDS):
        cap = "" if bond is None else f" --max_bond {bond}"
        if bond is not None:
            yield f"--shape separable{cap}", replace(plain, max_bond=bond)
        yield f"--shape paper{cap}", replace(plain, shape="paper", max_bond=bond)
        for p in _SIZES[1:-1]:
            yield f"--shape light --light_p {p}{cap}", replace(plain, shape="light", light_p=p, max_bond=bond)


def candidates(inventory: Inventory, base: MPOEConfig, usage: Usage, families: Sequence[str]) -> list[Suggestion]:
    """The grid's distinct shapes with their costs."""
    found: dict[object, Suggestion] = {}
    for options, config in _configurations(inventory, base):
        if config.shape not in families:
            continue
        matrices = {m for layer in inventory.layers for m in layer.matrices}
        shapes = {m: config.shape_for(m.kind, m.rows, m.columns) for m in matrices}
        key = frozenset((m, s.core_shapes) for m, s in shapes.items())
        if key in found:
            continue
        first = inventory.layers[0]
        auxiliary = sum(shapes[m].auxiliary_parameters for m in first.matrices) / first.elements
        central = sum(shapes[m].central_parameters for m in first.matrices) / first.elements
        found[key] = Suggestion(options, model_costs(inventory, config, usage), auxiliary, central + auxiliary)
    return list(found.values())


def front(suggestions: Sequence[Suggestion]) -> list[Suggestion]:
    """The Pareto front in capacity and FLOPs (parameters grow with capacity)."""
    ordered = sorted(suggestions, key=lambda s: (s.x_dense, -s.capacity, s.parameters))
    best, kept = -1.0, []
    for suggestion in ordered:
        if suggestion.capacity > best:
            best = suggestion.capacity
            kept.append(suggestion)
    return kept


def _spread(front: list[Suggestion], count: int) -> list[Suggestion]:
    """At most ``count`` of a front, evenly spaced from end to end."""
    if len(front) <= count:
        return front
    return [front[round(k * (len(front) - 1) / (count - 1))] for k in range(count)]


def suggest(
    inventory: Inventory,
    base: MPOEConfig,
    usage: Usage,
    budget: Limits,
    rank_by: str = "capacity",
    families: Sequence[str] = NAMED_SHAPES,
) -> list[Suggestion]:
    """Shapes within a budget, lossless ones first, then by ``rank_by``.

    Of each family (separable, light, paper; lossless or truncated), a few from the Pareto front in capacity *and* FLOPs
    are kept, from the cheapest to the largest. Shapes whose experts own almost nothing, or whose chain is too small for
    a pretrained matrix, are left out, unless the budget allows no others.

    Args:
        inventory, base, usage: model, experts and router, tokens.
        budget: upper bounds.
        rank_by: ``capacity`` (most auxiliary parameters per expert first), ``flops`` or ``parameters`` (least first).
        families: named shapes to choose among.

    Raises:
        ValueError: nothing meets the budget (the message names the nearest shape), or an unknown rank.
    """
    if rank_by not in RANKS:
        raise ValueError(f"rank_by must be one of {', '.join(RANKS)}; got {rank_by!r}")
    every = candidates(inventory, base, usage, families)
    within = [s for s in every if budget.excess(s) <= 1]
    if not within:
        raise ValueError(_nearest(every, budget, inventory))
    groups: dict[tuple[str, bool], list[Suggestion]] = {}
    for suggestion in [s for s in within if s.worthwhile] or within:
        groups.setdefault((str(suggestion.costs.config.shape), suggestion.costs.lossless), []).append(suggestion)
    keys = {
        "capacity": lambda s: (-s.capacity, s.x_dense),
        "flops": lambda s: (s.x_dense, -s.capacity),
        "parameters": lambda s: (s.parameters, s.x_dense),
    }
    key = keys[rank_by]
    chosen = [s for (_, lossless), group in groups.items() for s in _spread(front(group), _PER_FAMILY[lossless])]
    return sorted(chosen, key=lambda s: (not s.costs.lossless, *key(s)))


def _nearest(every: Sequence[Suggestion], budget: Limits, inventory: Inventory) -> str:
    asked = []
    if budget.parameters is not None:
        asked.append(f"max_parameters {budget.parameters:,}")
    if budget.x_dense is not None:
        asked.append(f"max_flops {budget.x_dense:g} x dense")
    lossless = [suggestion for suggestion in every if suggestion.costs.lossless]
    near = [min(pool, key=budget.excess) for pool in (lossless, every) if pool]
    texts = dict.fromkeys(
        f"{one.name} with {one.parameters:,} parameters, {one.x_dense:.3g} x dense"
        f"{' (lossless)' if one.costs.lossless else ' (truncated)'}"
        for one in near
    )
    return (
        f"no shape meets {' and '.join(asked)} with {every[0].costs.config.num_experts} experts (the dense model has "
        f"{inventory.parameters:,} parameters); nearest: {'; '.join(texts)}"
    )
