"""How each model family builds its layers; see `mpoe.models.table` for the list of families."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mpoe.models.table import TABLE


def name_pattern(glob: str) -> re.Pattern[str]:
    """Regular expression for module names, with or without a prefix.

    The first ``*`` is the layer's index (group ``layer``), later ones any number; ``{a,b}`` is a or b.
    """
    text = re.escape(glob).replace(r"\{", "(?:").replace(r"\}", ")").replace(",", "|")
    text = text.replace(r"\*", r"(?P<layer>\d+)", 1).replace(r"\*", r"\d+")
    return re.compile(rf"^(?:.*\.)?{text}$")


@dataclass(frozen=True)
class FFN:
    """One way to build a feed-forward network: names of its parts.

    Attributes:
        holder: names of the modules that hold one, for `name_pattern`.
        up, down, gate_proj: dense projections inside the holder. Orientation follows from their type: `nn.Linear`
            holds ``[out, in]``, `Conv1D` ``[in, out]``.
        fused: kinds whose weights are concatenated along the outputs of ``up``, in order, e.g. ``("gate_proj", "up")``.
        place: name, inside the holder, of the module that an `MPOEFeedForward` replaces; empty = the holder itself.
        emptied: modules inside the holder whose work the experts do; they become identities.
        zeroed: attributes of the holder that are set to 0: a dropout that the experts apply, a chunk size.
        sums: name, inside the holder, of the module that ends a network that is not a module of its own: it holds
            ``down`` and is called with what ``up`` gave and the network's input, which it adds.
        stream: the tokens that it processes: ``"main"``, ``"encoder"`` or ``"decoder"``.
    """

    holder: str
    up: str
    down: str
    gate_proj: str | None = None
    fused: tuple[str, ...] = ()
    place: str = ""
    emptied: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()
    sums: str = ""
    stream: str = "main"


def _no_dropout(config: Any) -> float:
    return 0.0


def _initializer_range(config: Any) -> tuple[float, float]:
    return config.initializer_range, config.initializer_range


@dataclass(frozen=True)
class Family:
    """How a model family builds its layers.

    Attributes:
        ffn: its feed-forward networks; the first one that matches a module is used.
        attention: names of attention projections, for `name_pattern`.
        pooler: name of the pooler's projection, if there is one.
        activation, dropout, output_dropout, init_std: read the model's config; ``init_std`` gives up and down.
        mixin: module and name of the class that converted models inherit from.
    """

    ffn: tuple[FFN, ...]
    attention: tuple[str, ...] = ()
    pooler: str | None = None
    activation: Callable[[Any], str] = lambda config: config.hidden_act
    dropout: Callable[[Any], float] = _no_dropout
    output_dropout: Callable[[Any], float] = _no_dropout
    init_std: Callable[[Any], tuple[float, float]] = _initializer_range
    mixin: tuple[str, str] = ("mpoe.models.base", "MPOEModelMixin")

    @property
    def is_mixture(self) -> bool:
        """Whether its models are already mixtures, without dense networks to convert."""
        return not self.ffn

    @property
    def takes_blocks(self) -> bool:
        """Whether its models support experts of the shape "hidden" between their projections."""
        return bool(self.ffn) and all(not ffn.place or ffn.up.startswith(f"{ffn.place}.") for ffn in self.ffn)


def family_of(model_type: str) -> Family:
    """The family of a dense model's ``model_type``, which must be in `TABLE`."""
    module = importlib.import_module(f"mpoe.models.families.{TABLE[model_type].file}")
    families: Mapping[str, Family] = module.FAMILIES
    return families[model_type]


def family_for(config: Any, model_type: str) -> Family:
    """The family of a converted model: described by its user in ``config.mpoe_sites``, or that of ``model_type``."""
    sites = getattr(config, "mpoe_sites", None)
    if sites is None:
        return family_of(model_type)
    given: Family = importlib.import_module("mpoe.models.families.given").given_family(sites)
    return given
