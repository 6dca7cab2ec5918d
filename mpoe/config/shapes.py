"""Shapes in a configuration: by name, by kind of projection, and by pattern of module names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mpoe.config.checks import check_choice, check_integer, check_type, refusing

if TYPE_CHECKING:
    from mpoe_kernels import MPOShape

KINDS = ("up", "gate_proj", "down")
SEPARABLE = "separable"
NAMED_SHAPES = (SEPARABLE, "paper", "light")
HIDDEN = "hidden"  # experts own blocks only on the hidden side; the projections stay dense
NEURONS = "neurons"  # experts own hidden neurons beside the dense network, which stays
KEPT_SHAPES = (HIDDEN, NEURONS)  # shapes that keep the dense projections
LARGEST_BLOCK = 64
_SHAPE_FIELDS = {"in_factors", "out_factors"}


def checked_shape(shape: Any, name: str = "shape") -> Any:
    """A named shape, or a dict from kinds to `MPOShape`.

    Raises:
        TypeError, ValueError: anything else, as ``name``.
    """
    known = (*NAMED_SHAPES, *KEPT_SHAPES)
    if isinstance(shape, str):
        check_choice(name, shape, known)
        return shape
    # here: the command line imports this, and torch is slow to import
    from mpoe_kernels import MPOShape

    wanted = f"one of {', '.join(map(repr, known))} or a mapping from {list(KINDS)} to MPOShape"
    check_type(name, shape, Mapping, wanted)
    shapes = {}
    for kind, value in shape.items():
        check_choice(f"{name}'s keys", kind, KINDS)
        check_type(f"{name}[{kind!r}]", value, (MPOShape, Mapping), "an MPOShape or its mapping")
        shapes[kind] = value if isinstance(value, MPOShape) else MPOShape.from_dict(value)
    missing = {"up", "down"} - set(shapes)
    if missing:
        raise ValueError(f"{name} must give 'up' and 'down'; missing {sorted(missing)}")
    return shapes


def checked_patterns(patterns: Any) -> dict[str, Any]:
    """``shape_pattern``: regular expression -> bond cap, named shape, `MPOShape`, or a dict from
    kinds to them.

    Raises:
        TypeError, ValueError: anything else.
    """
    check_type("shape_pattern", patterns, Mapping, "a mapping from patterns to shapes")
    from mpoe_kernels import MPOShape

    checked: dict[str, Any] = {}
    for pattern, value in patterns.items():
        name = f"shape_pattern[{pattern!r}]"
        invalid = f"shape_pattern must hold regular expressions; {pattern!r} is none: "
        with refusing(invalid, (re.error, TypeError)):
            re.compile(pattern)
        if isinstance(value, int):
            check_integer(name, value, 1)
        elif isinstance(value, Mapping) and set(value) >= _SHAPE_FIELDS:
            value = MPOShape.from_dict(value)
        elif not isinstance(value, MPOShape):
            value = checked_shape(value, name)
        checked[pattern] = value
    return checked


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches the module ``name``, or its end after a dot (like PEFT's
    ``rank_pattern``)."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


def shape_to_json(shape: Any) -> Any:
    """JSON-able form of a shape, a dict of shapes, a name or a number."""
    from mpoe_kernels import MPOShape

    if isinstance(shape, MPOShape):
        return shape.to_dict()
    if isinstance(shape, dict):
        return {kind: value.to_dict() for kind, value in shape.items()}
    return shape


def named_shape(
    name: str, in_features: int, out_features: int, max_bond: int | None, light_p: int
) -> MPOShape:
    """The shape called ``name`` for a weight ``[in_features, out_features]``."""
    from mpoe_kernels import MPOShape

    sizes = (in_features, out_features, light_p) if name == "light" else (in_features, out_features)
    return getattr(MPOShape, name)(*sizes, max_bond=max_bond)


def check_sizes(name: str, shape: MPOShape, in_features: int, out_features: int) -> MPOShape:
    """Return ``shape`` if it is for a weight of these sizes.

    Raises:
        ValueError: it is for another.
    """
    if (shape.in_features, shape.out_features) != (in_features, out_features):
        raise ValueError(
            f"{name} must be for a weight [{in_features}, {out_features}]; got one for "
            f"[{shape.in_features}, {shape.out_features}]"
        )
    return shape
