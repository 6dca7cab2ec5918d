"""The table of the study of quiet experts, and which lines of its success hold so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mpoe_bench.study.plan import Records, run_key
from mpoe_bench.study.tables import Section, page

if TYPE_CHECKING:
    from mpoe_bench.study.quiet import QuietPlan

METHODS = ("neurons", "quiet", "lora", "scaled", "replay, equal time", "replay, equal tokens")
NAMES = {
    "neurons": "own neurons, always on",
    "quiet": "**quiet expert**",
    "lora": "LoRA, always on",
    "scaled": "LoRA scaled to the same gain",
    "replay, equal time": "LoRA with replay, equal time",
    "replay, equal tokens": "LoRA with replay, equal tokens",
}


class Case:
    """One domain added by one method: what it gains and what it changes; losses in nats per
    token."""

    def __init__(
        self, plan: QuietPlan, base: Mapping[str, Any], domain: str, record: Mapping[str, Any]
    ) -> None:
        whole = f"{domain}, all"
        self.gain: float = base[whole] - record[whole]
        self.others = [record[other] - base[other] for other in plan.domains if other != domain]
        self.probes = [record[probe] - base[probe] for probe in plan.probes]
        self.answers: float = record["answers"]
        self.same: float = record["same"]
        self.prefix: float = record["prefix"]


def key_of(plan: QuietPlan, method: str, domain: str, seed: int, records: Records) -> str | None:
    """The key of a method's run; ``None`` while its rate is not known."""
    if method in ("quiet", "scaled"):
        return f"{method} {domain} {seed}"
    if method.startswith("replay"):
        steps = plan.equal_time if method.endswith("time") else plan.steps
        return plan.key("replay", domain, steps, seed, records)
    return plan.key(method, domain, plan.steps, seed, records)


def cases(plan: QuietPlan, method: str, records: Records) -> dict[tuple[str, int], Case]:
    """The finished ones, by domain and seed."""
    base = records.get("base")
    finished: dict[tuple[str, int], Case] = {}
    for seed in plan.seeds:
        for domain in plan.domains:
            record = records.get(key_of(plan, method, domain, seed, records) or "")
            if base is not None and record is not None:
                finished[domain, seed] = Case(plan, base, domain, record)
    return finished


def kept_of_one(plan: QuietPlan, method: str, records: Records) -> list[float]:
    """The shares of the own expert's gain, over the cases that both have finished."""
    always_on = cases(plan, "neurons", records)
    theirs = cases(plan, method, records)
    return [theirs[case].gain / always_on[case].gain for case in theirs if case in always_on]


def gain_of_many(plan: QuietPlan, records: Records, record: Mapping[str, Any]) -> float:
    """Nats per token, mean over domains."""
    base = records["base"]
    return fmean(base[f"{domain}, all"] - record[f"{domain}, all"] for domain in plan.domains)


def mixtures(plan: QuietPlan, records: Records) -> dict[int, Mapping[str, Any]]:
    """By seed: of four experts whose own runs have finished too."""
    always_on = cases(plan, "neurons", records)
    finished = {}
    for seed in plan.seeds:
        record = records.get(f"mixture {seed}")
        if record is not None and all((domain, seed) in always_on for domain in plan.domains):
            finished[seed] = record
    return finished


def kept_of_four(plan: QuietPlan, records: Records) -> list[float]:
    always_on = cases(plan, "neurons", records)
    shares = []
    for seed, record in mixtures(plan, records).items():
        most = fmean(always_on[domain, seed].gain for domain in plan.domains)
        shares.append(gain_of_many(plan, records, record) / most)
    return shares


def kept_of_tenants(records: Records, number: int) -> dict[str, float]:
    """The share of its own gain that each of several experts keeps."""
    record = records.get(f"tenants {number}", {})
    shares = {}
    for name, losses in record.items():
        if isinstance(losses, list):
            base, alone, mixture = losses
            shares[name] = (base - mixture) / (base - alone)
    return shares


def over_probes(plan: QuietPlan, records: Records, record: Mapping[str, Any]) -> list[float]:
    base = records["base"]
    return [record[probe] - base[probe] for probe in plan.probes]


Line = tuple[str, str, str]  # what must hold, what was measured, whether it does


def line(
    what: str, values: Sequence[float], limit: float, at_least: bool = False, worst: bool = False
) -> Line:
    """That the mean of the values (their largest, for ``worst``) is at most, or at least, a
    limit."""
    if not values:
        return what, "waits", ""
    measured = max(values) if worst else fmean(values)
    holds = measured >= limit if at_least else measured <= limit
    text = f"{measured:.4f} ({min(values):+.4f} to {max(values):+.4f}, {len(values)})"
    return what, text, "yes" if holds else "**no**"


def criteria(plan: QuietPlan, records: Records) -> list[Line]:
    """Every line that was written down before the first run."""
    limits = plan.success
    quiet = list(cases(plan, "quiet", records).values())
    others = [change for case in quiet for change in case.others]
    four = mixtures(plan, records)
    over = [change for record in four.values() for change in over_probes(plan, records, record)]
    lines = [
        line(
            "one expert: share of its own gain",
            kept_of_one(plan, "quiet", records),
            limits["own_kept"],
            True,
        ),
        line("one: other domains over the base", others, limits["others"]),
        line("one: worst other domain", others, limits["others_worst"], worst=True),
        line(
            "one: probes over the base",
            [p for case in quiet for p in case.probes],
            limits["probes"],
        ),
        line("one: KL on own answers", [case.answers for case in quiet], limits["answers"]),
        line("one: greedy tokens equal", [case.same for case in quiet], limits["same"], True),
        line(
            "four experts: share of their own gains",
            kept_of_four(plan, records),
            limits["four_kept"],
            True,
        ),
        line("four: probes over the base", over, limits["four_probes"]),
        line(
            "four: KL on own answers",
            [record["answers"] for record in four.values()],
            limits["four_answers"],
        ),
    ]
    first = four.get(plan.seeds[0])
    for name, rival in records.get("rivals", {}).items():
        if isinstance(rival, Mapping) and first is not None:
            ahead = gain_of_many(plan, records, first) - gain_of_many(plan, records, rival)
            lines.append(line(f"four: nats ahead of {name}", [ahead], limits["ahead"], True))
    for number, name in ((10, "ten_kept"), (20, "twenty_kept")):
        shares = kept_of_tenants(records, number)
        lines.append(
            line(
                f"{number} tenants: share of their own gains",
                list(shares.values()),
                limits[name],
                True,
            )
        )
    return lines


def of_methods(plan: QuietPlan, records: Records) -> list[list[Any]]:
    """A row a method: means over the finished cases."""
    rows = []
    for method in METHODS:
        finished = list(cases(plan, method, records).values())
        if not finished:
            continue
        others = [change for case in finished for change in case.others]
        probes = [change for case in finished for change in case.probes]
        shares = kept_of_one(plan, method, records)
        rows.append(
            [
                NAMES[method],
                len(finished),
                fmean(case.gain for case in finished),
                f"{fmean(shares):.1%}" if shares else "",
                f"{fmean(others):+.3f} ({max(others):+.3f})",
                f"{fmean(probes):+.3f} ({max(probes):+.3f})",
                f"{fmean(case.answers for case in finished):.4f}",
                f"{fmean(case.same for case in finished):.1%}",
                f"{fmean(case.prefix for case in finished):.1%}",
            ]
        )
    return rows


def of_cases(plan: QuietPlan, records: Records) -> list[list[Any]]:
    """A row for every finished case of every method."""
    always_on = cases(plan, "neurons", records)
    rows = []
    for method in METHODS:
        for (domain, seed), case in cases(plan, method, records).items():
            share = ""
            if (domain, seed) in always_on:
                share = f"{case.gain / always_on[domain, seed].gain:.1%}"
            row = [domain, seed, NAMES[method], case.gain, share, f"{max(case.others):+.3f}"]
            row.append(", ".join(f"{change:+.3f}" for change in case.probes))
            row += [f"{case.answers:.4f}", f"{case.same:.1%}"]
            rows.append(row)
    return rows


def of_many(plan: QuietPlan, records: Records) -> list[list[Any]]:
    """Mixtures of four and their rivals."""
    named = {}
    for seed, mixture in mixtures(plan, records).items():
        named[f"quiet experts, seed {seed}"] = mixture
    for name, rival in records.get("rivals", {}).items():
        if isinstance(rival, Mapping):
            named[name] = rival
    rows = []
    for name, record in named.items():
        gain = gain_of_many(plan, records, record)
        probes = fmean(over_probes(plan, records, record))
        rows.append(
            [name, gain, f"{probes:+.3f}", f"{record['answers']:.4f}", f"{record['same']:.1%}"]
        )
    return rows


def of_adapters(plan: QuietPlan, records: Records) -> list[list[Any]]:
    """What neurons keep of a LoRA of attention, or of all linear layers, on the test text."""
    rows = []
    for adapted in plan.adapters:
        for domain in plan.domains:
            record = records.get(f"adapter {adapted}: {domain}")
            if record is None:
                continue
            base, alone, *fitted = record["losses"]
            kept = f"{(base - fitted[0]) / (base - alone):.1%}" if fitted else record["refused"]
            rows.append([adapted, domain, record["neurons"], base - alone, kept])
    return rows


def of_costs(records: Records) -> list[list[Any]]:
    """Tokens per second and memory beside the first contender's."""
    record = records.get("costs", {})
    rows = []
    for phase in ("training", "reading", "answering"):
        contenders = record.get(phase, {})
        speeds = [speed for speed, _ in contenders.values()]
        for name, (speed, megabytes) in contenders.items():
            rows.append([phase, name, speed, f"{speed / speeds[0]:.2f}", megabytes])
    for step, seconds in record.get("background", {}).items():
        rows.append(["background", f"{step}: {seconds} s", "", "", ""])
    return rows


def of_lengths(plan: QuietPlan, records: Records) -> list[list[Any]]:
    """What one domain gains and what everything else loses, by steps."""
    base = records.get("base")
    seed = plan.seeds[0]
    domain = plan.forgetting
    rows = []
    for method in ("neurons", "quiet", "lora", "replay"):
        row: list[Any] = [method]
        for steps in sorted([*plan.lengths, plan.steps]):
            key: str | None = f"quiet {domain} {seed}"
            if method != "quiet":
                key = plan.key(method, domain, steps, seed, records)
            elif steps != plan.steps:
                key = f"{key} {steps}"
            record = records.get(key or "")
            if record is None or base is None:
                row.append("")
                continue
            case = Case(plan, base, domain, record)
            lost = fmean([*case.others, *case.probes])
            row.append(f"{case.gain:+.3f} / {lost:+.3f} / {case.answers:.4f}")
        rows.append(row)
    return rows


def quiet_table(plan: QuietPlan, records: Records) -> str:
    """The whole page."""
    header = ("", "cases", "gain", "of own neurons", "other domains (worst)", "probes (worst)")
    answers = ("KL, own answers", "greedy equal", "prefix equal")
    tenants: list[list[Any]] = []
    for number in (10, 20):
        for name, share in kept_of_tenants(records, number).items():
            tenants.append([number, name, share])
    rates = []
    for rate in plan.replay_rates:
        keys = [
            run_key("replay", domain, plan.equal_time, rate, plan.seeds[0])
            for domain in plan.domains
        ]
        if all(key in records for key in keys):
            rates.append([f"{rate:g}", fmean(records[key]["objective"] for key in keys)])
    sections: list[Section] = [
        (
            "Success, written down before the first run",
            "",
            ("", "measured", "holds"),
            criteria(plan, records),
        ),
        (
            "One domain added",
            "Nats per token beside the base.",
            (*header, *answers),
            of_methods(plan, records),
        ),
        (
            "Every case",
            "",
            (
                "",
                "seed",
                "",
                "gain",
                "of own neurons",
                "worst other domain",
                ", ".join(plan.probes),
                *answers[:2],
            ),
            of_cases(plan, records),
        ),
        ("Four", "", ("", "gain", "probes", *answers[:2]), of_many(plan, records)),
        (
            "Learnt / lost elsewhere / KL on own answers",
            f"One expert of {plan.forgetting}, by steps.",
            ("", *sorted([*plan.lengths, plan.steps])),
            of_lengths(plan, records),
        ),
        ("Tenants", "", ("experts", "", "share of own gain"), tenants),
        (
            "Any LoRA",
            "Neurons fitted to an adapter of the first seed, always on.",
            ("modules", "", "neurons a layer", "the adapter's gain", "kept"),
            of_adapters(plan, records),
        ),
        (
            "Costs",
            "One thread, seconds of processor time; medians of interleaved calls.",
            ("", "", "tokens per second", "beside the first", "MB"),
            of_costs(records),
        ),
        ("Rates of replay", "Its own loss on validation texts.", ("", "loss"), rates),
    ]
    return page(plan.title, [plan.question], sections)
