"""The table of the study of quiet experts, and which lines of its success hold so far."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from mpoe_bench.study.plan import TENANTS, Expert, QuietPlan, Record, Records
from mpoe_bench.study.tables import page

NAMES = {
    "neurons": "own neurons, always on",
    "quiet": "**quiet expert**",
    "lora": "LoRA, always on",
    "scaled": "LoRA scaled to the same gain",
    "replay, equal time": "LoRA with replay, equal time",
    "replay, equal tokens": "LoRA with replay, equal tokens",
}
# Of a plan's success: limits that a mean must reach; it must be at most the others.
AT_LEAST = ("own_kept", "same", "four_kept", "ahead", "ten_kept", "twenty_kept")
Rows = list[list[Any]]
Line = tuple[str, str, str]  # what must hold, what was measured, whether it does


class Case(NamedTuple):
    """Domains added by one method: what they gain, mean over them, and what they change; losses in
    nats per token.

    Attributes:
        gain: mean over the domains.
        share: of the gain of their own neurons, always on; ``None`` while these are not finished.
        others, probes: changes of other domains and of probes.
        answers, same: of the base's own answers: the divergence, and the share of greedy tokens
            that are equal.
    """

    gain: float
    share: float | None
    others: list[float]
    probes: list[float]
    answers: float
    same: float

    @property
    def elsewhere(self) -> float:
        return fmean([*self.others, *self.probes])


def shares_of(finished: Sequence[Case]) -> list[float]:
    return [case.share for case in finished if case.share is not None]


def changes_of(finished: Sequence[Case]) -> tuple[list[float], list[float]]:
    """Of other domains, and of probes."""
    others = [change for case in finished for change in case.others]
    return others, [change for case in finished for change in case.probes]


def means(finished: Sequence[Case]) -> list[str]:
    """Cells of the base's own answers."""
    answers = fmean(case.answers for case in finished)
    same = fmean(case.same for case in finished)
    return [f"{answers:.4f}", f"{same:.1%}"]


def share_text(finished: Sequence[Case]) -> str:
    shares = shares_of(finished)
    return f"{fmean(shares):.1%}" if shares else ""


def line(what: str, values: Sequence[float], limits: Mapping[str, float], name: str) -> Line:
    """That the mean of the values, or their largest, is at most, or at least, the limit of this
    name."""
    if not values:
        return what, "waits", ""
    measured = max(values) if name == "others_worst" else fmean(values)
    limit = limits[name]
    holds = measured >= limit if name in AT_LEAST else measured <= limit
    text = f"{measured:.4f} ({min(values):+.4f} to {max(values):+.4f}, {len(values)})"
    return what, text, "yes" if holds else "**no**"


class QuietResults:
    """What the finished runs of a plan say."""

    def __init__(self, plan: QuietPlan, records: Records) -> None:
        self.plan = plan
        self.records = records
        self.rates = plan.known_rates(records)
        self.own_gains = {}
        self.own_gains = {place: case.gain for place, case in self.cases("neurons").items()}

    def case(self, record: Record | None, domains: Sequence[str], seed: int) -> Any:
        """The `Case` of a record; ``None`` if there is none, or none of the base."""
        base = self.records.get("base")
        if base is None or record is None:
            return None

        def changes(names: Iterable[str]) -> list[float]:
            return [record[name] - base[name] for name in names]

        gain = -fmean(changes(f"{domain}, all" for domain in domains))
        share = None
        if all((domain, seed) in self.own_gains for domain in domains):
            share = gain / fmean(self.own_gains[domain, seed] for domain in domains)
        others = changes(domain for domain in self.plan.domains if domain not in domains)
        probes = changes(self.plan.probes)
        return Case(gain, share, others, probes, record["answers"], record["same"])

    def of_domain(self, method: str, domain: str, steps: int, seed: int) -> Case | None:
        """One domain added by a method (a kind of run) after some steps."""
        expert = Expert(method, domain, steps, self.rates.get(method), seed)
        return self.case(self.records.get(self.plan.key(expert)), [domain], seed)

    def cases(self, method: str) -> dict[tuple[str, int], Case]:
        """The finished ones of a method, by domain and seed."""
        finished = {}
        steps = self.plan.equal_time if method.endswith("equal time") else self.plan.steps
        kind = method.partition(",")[0]
        for seed in self.plan.seeds:
            for domain in self.plan.domains:
                case = self.of_domain(kind, domain, steps, seed)
                if case is not None:
                    finished[domain, seed] = case
        return finished

    def mixtures(self) -> dict[int, Case]:
        """By seed: of four experts whose own runs have finished too."""
        finished = {}
        for seed in self.plan.seeds:
            case = self.case(self.records.get(f"mixture {seed}"), self.plan.domains, seed)
            if case is not None and case.share is not None:
                finished[seed] = case
        return finished

    def rivals(self) -> dict[str, Case]:
        """By name: of the first seed's adapters."""
        records = self.records.get("rivals", {}).items()
        return {
            name: self.case(record, self.plan.domains, self.plan.seeds[0])
            for name, record in records
            if isinstance(record, Mapping)
        }

    def kept_of_tenants(self, number: int) -> dict[str, float]:
        """The share of its own gain that each of several experts keeps."""
        shares = {}
        for name, losses in self.records.get(f"tenants {number}", {}).items():
            if isinstance(losses, list):
                base, alone, mixture = losses
                shares[name] = (base - mixture) / (base - alone)
        return shares

    def criteria(self) -> list[Line]:
        """Every line that was written down before the first run."""
        limits = self.plan.success
        quiet = list(self.cases("quiet").values())
        others, probes = changes_of(quiet)
        mixtures = self.mixtures()
        four = list(mixtures.values())
        _, over = changes_of(four)
        answers = [case.answers for case in quiet]
        of_four = [case.answers for case in four]
        same = [case.same for case in quiet]
        lines = [
            line("one expert: share of its own gain", shares_of(quiet), limits, "own_kept"),
            line("one: other domains over the base", others, limits, "others"),
            line("one: worst other domain", others, limits, "others_worst"),
            line("one: probes over the base", probes, limits, "probes"),
            line("one: KL on own answers", answers, limits, "answers"),
            line("one: greedy tokens equal", same, limits, "same"),
            line("four experts: share of their own gains", shares_of(four), limits, "four_kept"),
            line("four: probes over the base", over, limits, "four_probes"),
            line("four: KL on own answers", of_four, limits, "four_answers"),
        ]
        first = mixtures.get(self.plan.seeds[0])
        if first is not None:
            for name, rival in self.rivals().items():
                ahead = [first.gain - rival.gain]
                lines.append(line(f"four: nats ahead of {name}", ahead, limits, "ahead"))
        for number, name in zip(TENANTS, ("ten_kept", "twenty_kept"), strict=True):
            shares = list(self.kept_of_tenants(number).values())
            what = f"{number} tenants: share of their own gains"
            lines.append(line(what, shares, limits, name))
        return lines

    def of_methods(self) -> Rows:
        """A row a method: means over the finished cases."""
        rows = []
        for method, name in NAMES.items():
            finished = list(self.cases(method).values())
            if not finished:
                continue
            row = [name, len(finished), fmean(case.gain for case in finished)]
            row.append(share_text(finished))
            for changes in changes_of(finished):
                row.append(f"{fmean(changes):+.3f} ({max(changes):+.3f})")
            rows.append(row + means(finished))
        return rows

    def of_cases(self) -> Rows:
        """A row for every finished case of every method."""
        rows = []
        for method, name in NAMES.items():
            for place, case in self.cases(method).items():
                probes = ", ".join(f"{change:+.3f}" for change in case.probes)
                worst = f"{max(case.others):+.3f}"
                row = [*place, name, case.gain, share_text([case]), worst, probes]
                rows.append(row + means([case]))
        return rows

    def of_many(self) -> Rows:
        """Mixtures of four and their rivals."""
        named = {f"quiet experts, seed {seed}": case for seed, case in self.mixtures().items()}
        rows = []
        for name, case in (named | self.rivals()).items():
            rows.append([name, case.gain, f"{fmean(case.probes):+.3f}", *means([case])])
        return rows

    def of_adapters(self) -> Rows:
        """What neurons keep of a LoRA of attention, or of all linear layers, on the test text."""
        rows = []
        for adapted in self.plan.adapters:
            for domain in self.plan.domains:
                record = self.records.get(f"adapter {adapted}: {domain}")
                if record is None:
                    continue
                base, alone, *fitted = record["losses"]
                kept = f"{(base - fitted[0]) / (base - alone):.1%}" if fitted else record["refused"]
                rows.append([adapted, domain, record["neurons"], base - alone, kept])
        return rows

    def of_costs(self) -> Rows:
        """Tokens per second and memory beside the first contender's."""
        record = self.records.get("costs", {})
        rows = []
        for phase in ("training", "reading", "answering"):
            contenders = record.get(phase, {})
            speeds = [speed for speed, _ in contenders.values()]
            for name, (speed, megabytes) in contenders.items():
                rows.append([phase, name, speed, f"{speed / speeds[0]:.2f}", megabytes])
        for step, seconds in record.get("background", {}).items():
            rows.append(["background", f"{step}: {seconds} s"])
        return rows

    def of_lengths(self, lengths: Sequence[int]) -> Rows:
        """What one domain gains and what everything else loses, by steps."""
        rows = []
        for method in ("neurons", "quiet", "lora", "replay"):
            row = [method]
            for steps in lengths:
                case = self.of_domain(method, self.plan.forgetting, steps, self.plan.seeds[0])
                cell = ""
                if case is not None:
                    cell = f"{case.gain:+.3f} / {case.elsewhere:+.3f} / {case.answers:.4f}"
                row.append(cell)
            rows.append(row)
        return rows

    def page(self) -> str:
        """The whole page."""
        plan = self.plan
        header = ("", "cases", "gain", "of own neurons", "other domains (worst)", "probes (worst)")
        answers = ("KL, own answers", "greedy equal")
        of_case = ("", "seed", "", "gain", "of own neurons", "worst other domain")
        lengths = sorted([*plan.lengths, plan.steps])
        tenants = [
            [number, name, share]
            for number in TENANTS
            for name, share in self.kept_of_tenants(number).items()
        ]
        losses = plan.losses_of_replay(self.records)
        sections = [
            (
                "Success, written down before the first run",
                "",
                ("", "measured", "holds"),
                self.criteria(),
            ),
            (
                "One domain added",
                "Nats per token beside the base.",
                (*header, *answers),
                self.of_methods(),
            ),
            ("Every case", "", (*of_case, ", ".join(plan.probes), *answers), self.of_cases()),
            ("Four", "", ("", "gain", "probes", *answers), self.of_many()),
            (
                "Learnt / lost elsewhere / KL on own answers",
                f"One expert of {plan.forgetting}, by steps.",
                ("", *lengths),
                self.of_lengths(lengths),
            ),
            ("Tenants", "", ("experts", "", "share of own gain"), tenants),
            (
                "Any LoRA",
                "Neurons fitted to an adapter of the first seed, always on.",
                ("modules", "", "neurons a layer", "the adapter's gain", "kept"),
                self.of_adapters(),
            ),
            (
                "Costs",
                "One thread, seconds of processor time; medians of interleaved calls.",
                ("", "", "tokens per second", "beside the first", "MB"),
                self.of_costs(),
            ),
            (
                "Rates of replay",
                "Its own loss on validation texts.",
                ("", "loss"),
                [[f"{rate:g}", loss] for rate, loss in losses.items()],
            ),
        ]
        return page(plan.title, [plan.question], sections)
