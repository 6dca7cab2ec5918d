"""Studies' tables in Markdown: what is finished, gains, paired t-tests; and which lines of a
success hold so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy.stats import t as student

from mpoe_bench.study.plan import (
    LAYERS,
    Comparison,
    Composition,
    Corner,
    Records,
    Run,
    Study,
    run_key,
)


class Spread(NamedTuple):
    """Mean, sample standard deviation (``None`` for a single number) and count of some numbers."""

    mean: float
    deviation: float | None
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def verdict(self) -> str:
        """Whether a paired difference is more than the variation between seeds explains, at 95%."""
        if self.deviation is None:
            return "one seed"
        if abs(self.mean) <= student.ppf(0.975, self.number - 1) * self.deviation / math.sqrt(
            self.number
        ):
            return "not significant"
        return "better" if self.mean > 0 else "worse"

    def text(self, sign: bool = False) -> str:
        number = f"{self.mean:{'+' if sign else ''}.4f}"
        return number if self.deviation is None else f"{number} ± {self.deviation:.4f}"


def markdown(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table's lines; what a row lacks at its end is empty."""
    shown = (
        [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    )
    whole = ([*cells, *[""] * (len(header) - len(cells))] for cells in shown)
    first, *others = (f"| {' | '.join(cells)} |" for cells in (list(map(str, header)), *whole))
    return [first, f"|{'---|' * len(header)}", *others, ""]


def chosen_rate(study: Study, model: int, arm: str, records: Records) -> float | None:
    """The known rate, or the candidate that is best on the validation split; ``None`` until every
    one has finished."""
    known = study.arms[arm].known_rate(model)
    if known is not None:
        return known
    runs = study.candidates(model, arm)
    if any(run.key not in records for run in runs):
        return None
    return min(runs, key=lambda run: records[run.key]["validation"]).rate


def runs_of(study: Study, corner: Corner, arm: str, records: Records) -> list[Run]:
    """The runs of an arm at a corner, one a seed; empty until its rate is chosen."""
    rate = chosen_rate(study, corner.model, arm, records)
    return [] if rate is None else [Run(corner, arm, rate, seed) for seed in study.seeds]


def finished(
    study: Study, corner: Corner, arm: str, records: Records
) -> dict[int, Mapping[str, Any]]:
    """seed -> record of an arm's finished runs at the rate that was chosen."""
    return {
        run.seed: records[run.key]
        for run in runs_of(study, corner, arm, records)
        if run.key in records
    }


def gain(study: Study, corner: Corner, arm: str, beside: str, records: Records) -> Spread | None:
    """How much lower ``arm``'s test loss is, seed by seed; ``None`` if no seed has both."""
    own, other = (finished(study, corner, key, records) for key in (arm, beside))
    both = sorted(own.keys() & other.keys())
    return Spread.of([other[seed]["test"] - own[seed]["test"] for seed in both]) if both else None


def judged(difference: Spread | None, study: Study, comparison: Comparison) -> str:
    """The verdict, or that seeds are missing."""
    if difference is None:
        return "waits"
    if difference.number < len(study.seeds):
        return "seeds are missing"
    if comparison.at_least is None:
        return difference.verdict()
    return "enough" if difference.mean >= comparison.at_least else "not enough"


def success(study: Study, records: Records) -> str:
    """Whether the study has succeeded, as far as it has gone."""
    needed: list[tuple[Corner, Comparison]] = [
        (at, one) for at, one in study.compared() if one.must_win
    ]
    if not needed:
        return "No comparison was written down as one that must be won."
    words = [
        judged(gain(study, at, one.arm, one.beside, records), study, one) for at, one in needed
    ]
    won = sum(word in ("better", "enough") for word in words)
    lost = sum(word in ("worse", "not significant", "not enough") for word in words)
    state = "has succeeded" if won == len(needed) else "has failed" if lost else "has no result yet"
    counts = f"of {len(needed)} comparisons that it must win, {won} are won and {lost} are not"
    return f"The study {state}: {counts}."


Section = tuple[
    str, str, Sequence[Any], Iterable[Sequence[Any]]
]  # title, words, and a table's header and rows


def page(title: str, lead: Sequence[str], sections: Iterable[Section]) -> str:
    """A study's page; a section without a title goes on with the one before."""
    lines = [f"# {title}", ""]
    for words in lead:
        lines += [words, ""]
    for title, words, header, rows in sections:
        lines += [
            *([f"## {title}", ""] if title else []),
            *([words, ""] if words else []),
            *markdown(header, rows),
        ]
    return "\n".join(lines).rstrip() + "\n"


def of_corner(study: Study, corner: Corner, arms: Sequence[str], records: Records) -> Section:
    """One row for every arm of a corner, also of those that wait."""
    header = [
        "arm",
        "rate",
        "seeds",
        "steps",
        "FFN weights, x dense",
        "with router and biases",
        "FFN FLOPs, x dense",
    ]
    header += ["test loss", f"gain over {study.arms[study.reference].name}"]
    rows: list[Sequence[str]] = []
    for arm in arms:
        done = list(finished(study, corner, arm, records).values())
        if not done:
            rows.append((study.arms[arm].name, "waits", f"0 of {len(study.seeds)}"))
            continue
        over = (
            None if arm == study.reference else gain(study, corner, arm, study.reference, records)
        )
        cells = (
            study.arms[arm].name,
            f"{chosen_rate(study, corner.model, arm, records):g}",
            f"{len(done)} of {len(study.seeds)}",
            f"{done[0]['steps']:,}",
            *(f"{done[0][name]:.2f}" for name in ("weights", "parameters", "flops")),
            Spread.of([record["test"] for record in done]).text(),
            "-" if over is None else f"{over.text(sign=True)} ({over.verdict()})",
        )
        rows.append(cells)
    layers = "" if corner.layers == LAYERS else f", {corner.layers} layers"
    return f"Model of size {corner.model}, {corner.steps:,} steps{layers}", "", header, rows


def of_comparisons(study: Study, records: Records) -> Section:
    """Every comparison that was written down, and its result so far."""
    rows = []
    compared = study.compared()
    for corner, one in compared:
        difference = gain(study, corner, one.arm, one.beside, records)
        must_win = "x" if one.must_win else ""
        names = corner, study.arms[one.arm].name, study.arms[one.beside].name, must_win
        result = (difference.number, difference.text(sign=True)) if difference else (0, "")
        rows.append((*names, *result, judged(difference, study, one)))
    thresholds = [one.at_least for _, one in compared if one.at_least is not None]
    tests = len(compared) - len(thresholds)
    words = (
        f"{tests} paired t-tests over seeds, at 95%: by chance alone, {0.05 * tests:.1f} of them "
        "would be"
        " significant. *Must win*: the study succeeds only if all of these are better."
    )
    if thresholds:
        words += " *Enough*: the mean gain is at least what the study's file names."
    header = "corner", "arm", "beside", "must win", "seeds", "gain", ""
    return "Comparisons written down before the first run", words, header, rows


def of_routers(study: Study, records: Records) -> Section:
    """What the routers do, in the mean over finished seeds."""
    names, rows = ("entropy", "mass", "token", "domain", "use"), []
    for corner, arms in study.corners().items():
        for arm in arms:
            done = [
                r["router"]
                for r in finished(study, corner, arm, records).values()
                if r.get("router")
            ]
            if done:
                rows.append(
                    (
                        corner,
                        study.arms[arm].name,
                        *(fmean(facts[name] for facts in done) for name in names),
                    )
                )
    words = (
        "Entropy of a token's probabilities (0 decided, 1 undecided) and the mass of its chosen "
        "experts; how much the"
        " byte and the domain tell about the expert, less what chance tells; entropy of the shares "
        "of all tokens. All"
        " but the mass are relative to log E."
    )
    return "Routers", words, ("corner", "arm", *names), rows


def of_rates(study: Study, records: Records) -> list[Section]:
    """Validation losses of the candidates."""
    title, words = (
        "Rates",
        f"Validation loss after {study.rate_steps:,} steps, seed {study.seeds[0]}.",
    )
    sections: list[Section] = []
    for model, rates in study.rates.items():
        rows = []
        for arm in study.arms:
            keys = [run.key for run in study.candidates(model, arm)]
            if any(key in records for key in keys):
                losses = (
                    f"{records[key]['validation']:.4f}" if key in records else "" for key in keys
                )
                rows.append((study.arms[arm].name, *losses))
        header = f"model of size {model}", *(f"{rate:g}" for rate in rates)
        sections.append(("" if sections else title, "" if sections else words, header, rows))
    return sections


def study_table(study: Study, records: Records) -> str:
    """The whole page."""
    corners = [of_corner(study, corner, arms, records) for corner, arms in study.corners().items()]
    sections = [
        *corners,
        of_comparisons(study, records),
        of_routers(study, records),
        *of_rates(study, records),
    ]
    return page(study.title, [study.question, success(study, records)], sections)


class Found:
    """Numbers of the finished runs; ``None`` where one is missing."""

    def __init__(self, plan: Composition, records: Records) -> None:
        self.plan, self.records = plan, records

    def own(self, kind: str, seed: int) -> dict[str, float] | None:
        """By domain: the loss of a seed's own experts at the chosen rate; of the probes the mean,
        one always on."""
        keys = {
            domain: self.plan.key(kind, domain, seed, self.records) for domain in self.plan.domains
        }
        if any(key not in self.records for key in keys.values()):
            return None
        probes = {
            probe: fmean(self.records[key][probe] for key in keys.values())
            for probe in self.plan.probes
        }
        return {domain: self.records[key]["test"] for domain, key in keys.items()} | probes

    def arms(self) -> dict[str, Mapping[str, Any]]:
        """What was measured on all texts, of the first seed."""
        first = self.plan.seeds[0]
        found: dict[str, Mapping[str, Any]] = {}
        if "base" in self.records:
            found["base"] = self.records["base"]
        for kind, name in (
            ("neurons", "own neurons, label given"),
            ("lora", "own LoRA, label given"),
        ):
            if own := self.own(kind, first):
                found[name] = own
        if f"composed {first}" in self.records:
            found["composed of files"] = self.records[f"composed {first}"]
        for key in ("variants", "merges", "request_router", "one_adapter"):
            parts = self.records.get(key, {})
            found |= {
                name: part
                for name, part in parts.items()
                if isinstance(part, Mapping) and "right" not in name
            }
        return found

    def over_seeds(self) -> list[tuple[dict[str, float], dict[str, float], Mapping[str, Any]]]:
        """Own neurons, own LoRA and the mixture of every finished seed."""
        found = []
        for seed in self.plan.seeds:
            parts = (
                self.own("neurons", seed),
                self.own("lora", seed),
                self.records.get(f"composed {seed}"),
            )
            if all(part is not None for part in parts):
                found.append(parts)
        return found  # type: ignore[return-value]

    def curve(self, kind: str) -> list[tuple[int, float, float]]:
        """Steps, what one expert has learnt, and what it costs the probes, always on."""
        plan, base, found = self.plan, self.records.get("base"), []
        for steps in sorted([plan.steps, *plan.lengths]):
            own = self.records.get(
                plan.key(kind, plan.forgetting, plan.seeds[0], self.records, steps)
            )
            if own is not None and base is not None:
                cost = fmean(own[probe] - base[probe] for probe in plan.probes)
                found.append((steps, base[plan.forgetting] - own["test"], cost))
        return found


def _at(curve: Sequence[tuple[int, float, float]], gain: float) -> float | None:
    """The cost at a gain, between the measured ones."""
    for (_, low, cost), (_, high, more) in zip(curve, curve[1:], strict=False):
        if low <= gain <= high:
            return cost + (more - cost) * (gain - low) / max(high - low, 1e-9)
    return None


Line = tuple[
    str, str, bool
]  # what must hold, what was measured (empty: nothing yet), whether it does


def _line(
    what: str, values: Sequence[float], holds: Callable[[float], bool], of: Any = fmean
) -> Line:
    """That ``of`` the values ``holds``."""
    told = f"{of(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})" if values else ""
    return what, told, bool(values) and holds(of(values))


def criteria(plan: Composition, records: Records) -> list[Line]:
    """Every line that was written down before the first run."""
    found, domains = Found(plan, records), plan.domains
    seeds, arms, base = found.over_seeds(), found.arms(), records.get("base")
    behind = [fmean([own[d] - lora[d] for d in domains]) for own, lora, _ in seeds]
    neurons, lora = (found.curve(kind) for kind in ("neurons", "lora"))
    costs = [(cost, _at(lora, gain)) for _, gain, cost in neurons]
    known = [(ours, theirs) for ours, theirs in costs if theirs is not None]
    text = "; ".join(f"{ours:+.3f} : {theirs:+.3f}" for ours, theirs in known)
    kept = [fmean([mix[d] - own[d] for own, _, mix in seeds]) for d in domains] if seeds else []
    lines = [
        _line("own neurons at most .05 behind own LoRA", behind, lambda value: value <= 0.05),
        (
            "less forgetting than LoRA at equal learning (neurons : LoRA)",
            text,
            all(a < b for a, b in known),
        ),
        _line("composed at most .04 behind own neurons", kept, lambda value: value <= 0.04),
        _line("on every domain at most .06", kept, lambda value: value <= 0.06, max),
    ]
    mixture, router = arms.get("composed of files"), arms.get("request router, LoRA")
    for name in ("mean of LoRAs", "TIES of LoRAs", "DARE of LoRAs"):
        ahead = [arms[name][d] - mixture[d] for d in domains] if name in arms and mixture else []
        lines.append(_line(f"ahead of {name} by more than .05", ahead, lambda value: value > 0.05))
    over = [mix[p] - base[p] for _, _, mix in seeds for p in plan.probes] if base else []
    lines.append(_line("probes at most .01 over the base", over, lambda value: value <= 0.01, max))
    halfway, words, better = "requests that change halfway: ahead of the request router", "", False
    if router and mixture:
        pairs = zip(router["requests"], mixture["requests"], strict=True)
        spread = Spread.of([theirs - ours for theirs, ours in pairs])
        words, better = (
            f"{spread.text(sign=True)} over {spread.number} requests",
            spread.verdict() == "better",
        )
    lines.append((halfway, words, better))
    shares = list(gains(plan, records).values())[-1:]
    return [
        *lines,
        _line("at least 90% of the gain at ten tenants", shares, lambda value: value >= 0.9),
    ]


def gains(plan: Composition, records: Records) -> dict[int, float]:
    """Number of tenants -> mean share of their own experts' gain that the mixture keeps."""
    tenants, base, found = records.get("tenants", {}), records.get("base", {}), {}
    for number, losses in ((int(key), part) for key, part in tenants.items() if key.isdigit()):
        shares = []
        for domain in [*plan.domains, *plan.tenants][:number]:
            own = records[plan.key("neurons", domain, plan.seeds[0], records)]
            before = own.get("base", base.get(domain))
            shares.append((before - losses[domain]) / (before - own["test"]))
        found[number] = fmean(shares)
    return found


def composed_table(plan: Composition, records: Records) -> str:
    """The whole page."""
    found, kinds = Found(plan, records), ("neurons", "lora")
    texts, lengths = [*plan.domains, *plan.probes, "requests"], sorted([plan.steps, *plan.lengths])
    verdicts = [
        (what, told or "waits", told and ("yes" if holds else "**no**"))
        for what, told, holds in criteria(plan, records)
    ]
    base = records.get("base", {})
    of_arms = []
    for name, losses in found.arms().items():
        cells = [losses.get(text, "") for text in texts]
        gain = fmean(base[d] - losses[d] for d in plan.domains) if base else ""
        of_arms.append(
            [name, *(fmean(cell) if isinstance(cell, list) else cell for cell in cells), gain]
        )
    seeds = []
    for seed, parts in zip(plan.seeds, found.over_seeds(), strict=False):
        kept = [(base[d] - parts[2][d]) / (base[d] - parts[0][d]) for d in plan.domains if base]
        shown = [" : ".join(f"{part[d]:.3f}" for part in parts) for d in plan.domains]
        seeds.append([seed, *shown, fmean(kept) if kept else ""])
    curves = [
        [kind, *(f"{gain:+.3f} / {cost:+.3f}" for _, gain, cost in found.curve(kind))]
        for kind in kinds
    ]
    rates: list[list[Any]] = []
    for kind in kinds:
        rates.append([kind])
        for rate in plan.rates:
            own = [
                records.get(run_key(kind, d, plan.steps, rate, plan.seeds[0])) for d in plan.domains
            ]
            rates[-1].append(fmean([one["validation"] for one in own if one]) if all(own) else "")
    wrong = records.get("tenants", {}).get("best wrong expert", {})
    told = {
        name: value for name, value in records.get("answers", {}).items() if name != "cpu_seconds"
    }
    sections: list[Section] = [
        ("Success, written down before the first run", "", ("", "measured", "holds"), verdicts),
        ("Nats per token, first seed", "", ("", *texts, "gain"), of_arms),
        (
            "Own neurons : own LoRA : composed, every seed",
            "",
            ("seed", *plan.domains, "gain kept"),
            seeds,
        ),
        (
            "Learnt / forgotten",
            f"One expert of {plan.forgetting}, always on: its gain, and what the probes lose in "
            "the mean.",
            ("steps", *lengths),
            curves,
        ),
        ("Tenants", "", ("experts", "share of the gain kept"), gains(plan, records).items()),
        ("With the best of the other experts always on", "", ("", "loss"), wrong.items()),
        ("The base's own answers to eight questions, nats per token", "", ("", ""), told.items()),
        ("Rates", "Validation loss, mean over domains, first seed.", ("", *plan.rates), rates),
    ]
    return page(plan.title, [plan.question], sections)
