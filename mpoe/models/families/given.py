"""A family that the user describes: the argument ``sites`` of `convert_to_mpoe`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mpoe.config.checks import check_fields
from mpoe.layers.activations import check_activation
from mpoe.models.families import FFN, Family


@dataclasses.dataclass(frozen=True)
class Sites(FFN):
    """`FFN` plus the settings that a known family's model configuration provides.

    Attributes:
        activation: name of the activation between the projections, see `mpoe.layers.activations`.
        dropout: rate between the projections.
        output_dropout: rate that the dense network applies to its result inside the holder.
    """

    activation: str = ""
    dropout: float = 0.0
    output_dropout: float = 0.0


def checked_sites(sites: Any) -> dict[str, Any]:
    """``sites`` as a JSON-able dict.

    Raises:
        TypeError: not a mapping, or fields of other types.
        ValueError: an unknown field, a holder without ``*``, an activation that experts cannot compute.
    """
    if not isinstance(sites, Mapping):
        wanted = "a mapping with 'holder', 'up', 'down', 'activation'"
        raise TypeError(f"sites must be {wanted}; got {type(sites).__name__}")
    check_fields(Sites, sites, "sites")
    missing = [name for name in ("holder", "up", "down", "activation") if not sites.get(name)]
    if missing:
        raise ValueError(f"sites must name 'holder', 'up', 'down' and 'activation'; {', '.join(missing)} is missing")
    for name in ("holder", "up", "down", "gate_proj", "place", "sums", "stream"):
        if not isinstance(sites.get(name) or "", str):
            raise TypeError(f"sites[{name!r}] must be a name; got {sites[name]!r}")
    for name in ("fused", "emptied", "zeroed"):
        given = sites.get(name, ())
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"sites[{name!r}] must be a list of names; got {given!r}")
    if "*" not in sites["holder"]:
        raise ValueError(f"sites['holder'] must hold a * for the number of the layer; got {sites['holder']!r}")
    check_activation(sites["activation"])
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sites.items()}


def given_family(sites: Mapping[str, Any]) -> Family:
    """The family that checked ``sites`` describe."""
    values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in sites.items()}
    given = Sites(**values)
    return Family(
        ffn=(given,),
        activation=lambda config: given.activation,
        dropout=lambda config: given.dropout,
        output_dropout=lambda config: given.output_dropout,
        init_std=lambda config: (getattr(config, "initializer_range", 0.02),) * 2,
    )
