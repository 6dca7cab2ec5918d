"""A study's file: what is trained and compared, written down before the first run."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

SIZES = ("neurons", "latent", "block_size")  # of an `MPOEConfig`: a fraction in quotes is of the model's size


@dataclass(frozen=True)
class Corner:
    """A size of the model and a length of training."""

    model: int
    steps: int

    def __str__(self) -> str:
        return f"{self.model}/{self.steps}"


@dataclass(frozen=True)
class Arm:
    """A model and how it is trained.

    Attributes:
        name: for tables.
        experts: fields of its `MPOEConfig`; ``None`` = a dense model.
        hidden: hidden size of the dense network, as a fraction of the usual one, four times the model's size.
        flops_of: an arm; the hidden size is chosen so that both feed-forward layers, router in, take as many FLOPs.
        size_of: the same for parameters, router in.
        budget_of: an arm; as many steps as the whole model can train for its training FLOPs, with a schedule to zero.
        dense_until: the share of steps after which the dense model is converted, and the optimiser restarted.
        own_start: experts start from their own random weights instead of the dense network's.
    """

    name: str
    experts: dict[str, Any] | None = None
    hidden: str = "1"
    flops_of: str | None = None
    size_of: str | None = None
    budget_of: str | None = None
    dense_until: float = 0.25
    own_start: bool = False

    def fields(self, model: int) -> dict[str, Any]:
        """Fields of the `MPOEConfig` for a model's size."""
        found = dict(self.experts or {})
        for name in SIZES:
            if isinstance(found.get(name), str):
                found[name] = int(Fraction(found[name]) * model)
        return found


@dataclass(frozen=True)
class Stage:
    """Runs of some arms at a corner; stages run in their order."""

    model: int
    steps: int
    arms: tuple[str, ...]

    @property
    def corner(self) -> Corner:
        return Corner(self.model, self.steps)


@dataclass(frozen=True)
class Comparison:
    """``arm`` is compared with ``beside`` at every corner that has both.

    Attributes:
        must_win: the study has succeeded only if ``arm`` is significantly better at each of these corners.
    """

    arm: str
    beside: str
    must_win: bool = False


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    corner: Corner
    arm: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.corner} {self.arm} {self.rate:g} {self.seed}"


@dataclass(frozen=True)
class Study:
    """What a study's file says.

    Attributes:
        title, question: for its table.
        reference: the arm over which gains are shown.
        seeds: every arm runs with each; the first also chooses the arm's rate.
        rates: model's size -> the candidates, the same for every arm.
        rate_steps: length of the runs that choose a rate, on the validation split.
        arms, stages, comparisons: see there.
    """

    title: str
    question: str
    reference: str
    seeds: tuple[int, ...]
    rates: dict[int, tuple[float, ...]]
    rate_steps: int
    arms: dict[str, Arm]
    stages: tuple[Stage, ...]
    comparisons: tuple[Comparison, ...] = field(default=())

    def corners(self) -> dict[Corner, list[str]]:
        """The arms of every corner, each once, in order."""
        found: dict[Corner, list[str]] = {}
        for stage in self.stages:
            arms = found.setdefault(stage.corner, [])
            arms += [arm for arm in stage.arms if arm not in arms]
        return found

    def compared(self) -> list[tuple[Corner, Comparison]]:
        """Every test of the study: a comparison at a corner."""
        corners = self.corners()
        return [(at, c) for c in self.comparisons for at, arms in corners.items() if {c.arm, c.beside} <= set(arms)]

    def candidates(self, model: int, arm: str) -> list[Run]:
        """The runs that choose an arm's rate at a model's size."""
        return [Run(Corner(model, self.rate_steps), arm, rate, self.seeds[0]) for rate in self.rates[model]]


def _made(kind: type, where: str, values: dict[str, Any]) -> Any:
    """A dataclass from a file's values; lists become tuples.

    Raises:
        ValueError: names a field that is unknown or missing.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            raise ValueError(f"{where} must have fields among {', '.join(known)}; got {name!r}")
    for name, f in known.items():
        if name not in values and f.default is dataclasses.MISSING:
            raise ValueError(f"{where} must have the field {name!r}; got only {', '.join(values)}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def read_study(path: Path) -> Study:
    """Read a study's TOML file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: names a field, arm or size that is unknown or missing.
    """
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    values["rates"] = {int(model): tuple(rates) for model, rates in values.get("rates", {}).items()}
    values["arms"] = {key: _made(Arm, f"arms.{key}", arm) for key, arm in values.get("arms", {}).items()}
    values["stages"] = [_made(Stage, "stages", stage) for stage in values.get("stages", [])]
    values["comparisons"] = [_made(Comparison, "comparisons", one) for one in values.get("comparisons", [])]
    study: Study = _made(Study, "the study", values)
    named = [*(arm for stage in study.stages for arm in stage.arms), study.reference]
    named += [arm for one in study.comparisons for arm in (one.arm, one.beside)]
    named += [of for arm in study.arms.values() for of in (arm.flops_of, arm.size_of, arm.budget_of) if of]
    for name in named:
        if name not in study.arms:
            raise ValueError(f"arms must be among {', '.join(study.arms)}; got {name!r}")
    for stage in study.stages:
        if stage.model not in study.rates:
            raise ValueError(f"rates must have candidates for the model's size {stage.model}; got {list(study.rates)}")
    return study
