"""A study's file: what is trained and compared, written down before the first run."""

import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from mpoe.config.checks import check_choice, check_fields, refusing

Record = dict[str, Any]  # what a run found, JSON-able
Records = Mapping[str, Record]  # a run's key -> its record
# Of the model where a stage names no number of layers, and of the runs that choose a rate.
LAYERS = 2
# Of an `MPOEConfig`: a fraction in quotes is of the model's size.
SIZES = ("neurons", "latent", "block_size")
TENANTS = (10, 20)  # experts of the mixtures of many tenants


class Corner(NamedTuple):
    """A size of the model, a length of training and the model's number of layers."""

    model: int
    steps: int
    layers: int = LAYERS

    def __str__(self) -> str:
        text = f"{self.model}/{self.steps}"
        return text if self.layers == LAYERS else f"{text}/{self.layers}"


@dataclass(frozen=True)
class Arm:
    """A model and how it is trained.

    Attributes:
        name: for tables.
        experts: fields of its `MPOEConfig`; ``None`` = a dense model.
        hidden: hidden size of the dense network, as a fraction of the usual one, four times the
            model's size.
        flops_of: an arm; the hidden size is chosen so that both feed-forward layers, router in,
            take as many FLOPs.
        size_of: the same for parameters, router in.
        budget_of: an arm; as many steps as the whole model can train for its training FLOPs, with a
            schedule to zero.
        dense_until: the share of steps after which the dense model is converted, and the optimiser
            restarted.
        own_start: experts start from their own random weights instead of the dense network's.
        known_rates: model's size in quotes -> the rate that an earlier study chose; the others are
            chosen by runs.
    """

    name: str
    experts: dict | None = None
    hidden: str = "1"
    flops_of: str | None = None
    size_of: str | None = None
    budget_of: str | None = None
    dense_until: float = 0.25
    own_start: bool = False
    known_rates: dict[str, float] | None = None

    def known_rate(self, model: int) -> float | None:
        """The rate that no run of this study has to choose."""
        return (self.known_rates or {}).get(str(model))

    def fields(self, model: int) -> dict:
        """Fields of the `MPOEConfig` for a model's size."""
        fields = dict(self.experts or {})
        for name in SIZES:
            if isinstance(fields.get(name), str):
                fields[name] = int(Fraction(fields[name]) * model)
        return fields


@dataclass(frozen=True)
class Stage:
    """Runs of some arms at a corner; stages run in their order."""

    model: int
    steps: int
    arms: Sequence[str]
    layers: int = LAYERS

    @property
    def corner(self) -> Corner:
        return Corner(self.model, self.steps, self.layers)


@dataclass(frozen=True)
class Comparison:
    """``arm`` is compared with ``beside`` at every corner that has both.

    Attributes:
        must_win: the study has succeeded only if ``arm`` is significantly better at each of these
            corners.
        at_least: the mean gain that is enough, in nats per byte; it takes the place of the t-test.
    """

    arm: str
    beside: str
    must_win: bool = False
    at_least: float | None = None


class Run(NamedTuple):
    """One training run of a study."""

    corner: Corner
    arm: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.corner} {self.arm} {self.rate:g} {self.seed}"

    @classmethod
    def of(cls, key: str) -> "Run":
        """The run with this key."""
        sizes, arm, rate, seed = key.split()
        corner = Corner(*map(int, sizes.split("/")))
        return cls(corner, arm, float(rate), int(seed))


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
    seeds: Sequence[int]
    rates: Mapping[int, Sequence[float]]
    rate_steps: int
    arms: Mapping[str, Arm]
    stages: Sequence[Stage]
    comparisons: Sequence[Comparison] = ()

    def corners(self) -> dict[Corner, list[str]]:
        """The arms of every corner, each once, in order."""
        corners = defaultdict(list)
        for stage in self.stages:
            arms = corners[stage.corner]
            arms += [arm for arm in stage.arms if arm not in arms]
        return dict(corners)

    def compared(self) -> list[tuple[Corner, Comparison]]:
        """Every test of the study: a comparison at a corner."""
        corners = self.corners()
        compared = []
        for one in self.comparisons:
            for corner, arms in corners.items():
                if one.arm in arms and one.beside in arms:
                    compared.append((corner, one))
        return compared

    def candidates(self, model: int, arm: str) -> list[Run]:
        """The runs that choose an arm's rate at a model's size; none where it is known."""
        if self.arms[arm].known_rate(model) is not None:
            return []
        return [
            Run(Corner(model, self.rate_steps), arm, rate, self.seeds[0])
            for rate in self.rates[model]
        ]


def made(kind: type, where: str, values: dict) -> Any:
    """A dataclass from a file's values.

    Raises:
        ValueError: names a field that is unknown or missing.
    """
    check_fields(kind, values, where)
    with refusing(f"{where}: ", TypeError):
        return kind(**values)


class Expert(NamedTuple):
    """One domain added in the study of quiet experts: neurons, a LoRA, or a LoRA with replay,
    trained at a rate; or what is made of these without training (``quiet``, ``scaled``)."""

    kind: str
    domain: str
    steps: int
    rate: float | None
    seed: int


@dataclass(frozen=True)
class QuietPlan:
    """What quiet.toml says."""

    title: str
    question: str
    seeds: Sequence[int]
    steps: int
    lengths: Sequence[int]
    domains: Sequence[str]
    forgetting: str
    probes: Sequence[str]
    tenants: Sequence[str]
    neurons: int
    rank: int
    replay_rates: Sequence[float]
    rates: Mapping[str, float]
    adapters: Mapping[str, str | list[str]]
    success: Mapping[str, float]

    @property
    def equal_time(self) -> int:
        """Steps of replay that take about as long as `steps` without."""
        return self.steps // 2

    def key(self, expert: Expert) -> str:
        """Of the run among the records."""
        kind, domain, steps, rate, seed = expert
        if rate is not None:
            return f"{kind} {domain} {steps} {rate:g} {seed}"
        key = f"{kind} {domain} {seed}"
        return key if steps == self.steps else f"{key} {steps}"

    def candidates(self, rate: float) -> list[Expert]:
        """The runs by which a rate of replay is judged."""
        seed = self.seeds[0]
        return [Expert("replay", domain, self.equal_time, rate, seed) for domain in self.domains]

    def losses_of_replay(self, records: Records) -> dict[float, float]:
        """Rate -> replay's own loss on validation texts, mean over domains; of finished rates."""
        losses = {}
        for rate in self.replay_rates:
            keys = [self.key(expert) for expert in self.candidates(rate)]
            if all(key in records for key in keys):
                losses[rate] = fmean(records[key]["objective"] for key in keys)
        return losses

    def known_rates(self, records: Records) -> dict[str, float]:
        """Kind -> rate; replay's, the best of its candidates, once all have finished."""
        losses = self.losses_of_replay(records)
        if len(losses) < len(self.replay_rates):
            return dict(self.rates)
        return {**self.rates, "replay": min(losses, key=losses.__getitem__)}


def values_of(path: Path) -> dict:
    """What a study's TOML file says."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def read_study(path: Path) -> Study:
    """Read the file of a study with arms.

    Raises:
        FileNotFoundError: there is none.
        ValueError: names a field, arm or size that is unknown or missing.
    """
    values = values_of(path)
    rates = values.get("rates", {})
    values["rates"] = {int(model): candidates for model, candidates in rates.items()}
    arms = values.get("arms", {})
    values["arms"] = {key: made(Arm, f"arms.{key}", arm) for key, arm in arms.items()}
    values["stages"] = [made(Stage, "stages", stage) for stage in values.get("stages", [])]
    values["comparisons"] = [
        made(Comparison, "comparisons", one) for one in values.get("comparisons", [])
    ]
    study = made(Study, "the study", values)
    named = [study.reference]
    for stage in study.stages:
        named += stage.arms
    for one in study.comparisons:
        named += [one.arm, one.beside]
    for arm in study.arms.values():
        named += [arm.flops_of, arm.size_of, arm.budget_of]
    for name in named:
        if name is not None:
            check_choice("arms", name, list(study.arms))
    for stage in study.stages:
        if stage.layers < 1:
            raise ValueError(f"layers of a stage must be at least 1; got {stage.layers}")
        chosen_by_runs = [
            arm for arm in stage.arms if study.arms[arm].known_rate(stage.model) is None
        ]
        if chosen_by_runs and stage.model not in study.rates:
            raise ValueError(
                f"rates must have candidates for the model's size {stage.model}; got "
                f"{list(study.rates)}"
            )
    return study
