"""The table of a study of composed experts, and which lines of its success hold so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mpoe_bench.study.plan import Composition, own_key
from mpoe_bench.study.table import Records, Spread, markdown


def _table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    shown = ([f"{cell:.3f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return markdown(header, [[*row, *[""] * (len(header) - len(row))] for row in shown])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Found:
    """Numbers of the finished runs; ``None`` where one is missing."""

    def __init__(self, plan: Composition, records: Records) -> None:
        self.plan, self.records = plan, records

    def own(self, kind: str, seed: int, what: str = "test") -> dict[str, float] | None:
        """By domain: the loss of a seed's own experts at the chosen rate."""
        rate, plan = self.plan.rate(kind, self.records), self.plan
        if rate is None:
            return None
        keys = {domain: own_key(kind, domain, plan.steps, rate, seed) for domain in plan.domains}
        if any(key not in self.records for key in keys.values()):
            return None
        return {domain: self.records[key][what] for domain, key in keys.items()}

    def arms(self) -> dict[str, Mapping[str, Any]]:
        """What was measured on all texts, of the first seed."""
        first = self.plan.seeds[0]
        found: dict[str, Mapping[str, Any]] = {}
        if "base" in self.records:
            found["base"] = self.records["base"]
        for kind, name in (("neurons", "own neurons, label given"), ("lora", "own LoRA, label given")):
            if own := self.own(kind, first):
                found[name] = own
        if f"composed {first}" in self.records:
            found["composed of files"] = self.records[f"composed {first}"]
        for key in ("variants", "merges", "request_router", "one_adapter"):
            parts = self.records.get(key, {})
            found |= {name: part for name, part in parts.items() if isinstance(part, Mapping) and "right" not in name}
        return found

    def over_seeds(self) -> list[tuple[dict[str, float], dict[str, float], Mapping[str, Any]]]:
        """Own neurons, own LoRA and the mixture of every finished seed."""
        found = []
        for seed in self.plan.seeds:
            parts = self.own("neurons", seed), self.own("lora", seed), self.records.get(f"composed {seed}")
            if all(part is not None for part in parts):
                found.append(parts)
        return found  # type: ignore[return-value]

    def curve(self, kind: str) -> list[tuple[int, float, float]]:
        """Steps, what one expert has learnt, and what it costs the probes, always on."""
        plan, base = self.plan, self.records.get("base")
        rate, domain, found = plan.rate(kind, self.records), plan.forgetting, []
        if base is None or rate is None:
            return []
        for steps in sorted([plan.steps, *plan.lengths]):
            own = self.records.get(own_key(kind, domain, steps, rate, plan.seeds[0]))
            if own is not None:
                cost = _mean([own[probe] - base[probe] for probe in plan.probes])
                found.append((steps, base[domain] - own["test"], cost))
        return found


def _at(curve: Sequence[tuple[int, float, float]], gain: float) -> float | None:
    """The cost at a gain, between the measured ones."""
    for (_, low, cost), (_, high, more) in zip(curve, curve[1:], strict=False):
        if low <= gain <= high:
            return cost + (more - cost) * (gain - low) / max(high - low, 1e-9)
    return None


Line = tuple[str, str, bool]  # what must hold, what was measured (empty: nothing yet), whether it does


def _line(what: str, values: Sequence[float], holds: Callable[[float], bool], of: Any = _mean) -> Line:
    """That ``of`` the values ``holds``."""
    told = f"{of(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})" if values else ""
    return what, told, bool(values) and holds(of(values))


def success(plan: Composition, records: Records) -> list[Line]:
    """Every line that was written down before the first run."""
    found, domains = Found(plan, records), plan.domains
    seeds, arms, base = found.over_seeds(), found.arms(), records.get("base")
    behind = [_mean([own[d] - lora[d] for d in domains]) for own, lora, _ in seeds]
    neurons, lora = (found.curve(kind) for kind in ("neurons", "lora"))
    costs = [(cost, _at(lora, gain)) for _, gain, cost in neurons]
    known = [(ours, theirs) for ours, theirs in costs if theirs is not None]
    text = "; ".join(f"{ours:+.3f} : {theirs:+.3f}" for ours, theirs in known)
    kept = [_mean([mix[d] - own[d] for own, _, mix in seeds]) for d in domains] if seeds else []
    lines = [
        _line("own neurons at most .05 behind own LoRA", behind, lambda value: value <= 0.05),
        ("less forgetting than LoRA at equal learning (neurons : LoRA)", text, all(a < b for a, b in known)),
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
        words, better = f"{spread.text(sign=True)} over {spread.count} requests", spread.verdict() == "better"
    lines.append((halfway, words, better))
    shares = list(gains(plan, records).values())[-1:]
    return [*lines, _line("at least 90% of the gain at ten tenants", shares, lambda value: value >= 0.9)]


def gains(plan: Composition, records: Records) -> dict[int, float]:
    """Number of tenants -> mean share of their own experts' gain that the mixture keeps."""
    tenants, base, rate = records.get("tenants"), records.get("base"), plan.rate("neurons", records)
    if tenants is None or base is None or rate is None:
        return {}
    found = {}
    for number, losses in ((int(key), part) for key, part in tenants.items() if key.isdigit()):
        shares = []
        for domain in [*plan.domains, *plan.tenants][:number]:
            own = records[own_key("neurons", domain, plan.steps, rate, plan.seeds[0])]
            before = own.get("base", base.get(domain))
            shares.append((before - losses[domain]) / (before - own["test"]))
        found[number] = _mean(shares)
    return found


def composed_table(plan: Composition, records: Records) -> str:
    """The whole page."""
    found, kinds = Found(plan, records), ("neurons", "lora")
    texts, lengths = [*plan.domains, *plan.probes, "requests"], sorted([plan.steps, *plan.lengths])
    verdicts = [
        (what, told or "waits", told and ("yes" if holds else "**no**")) for what, told, holds in success(plan, records)
    ]
    of_arms = []
    for name, losses in found.arms().items():
        cells = [losses.get(text, "") for text in texts]
        of_arms.append([name, *(_mean(cell) if isinstance(cell, list) else cell for cell in cells)])
    seeds = [
        [seed, *(" : ".join(f"{part[d]:.3f}" for part in parts) for d in plan.domains)]
        for seed, parts in zip(plan.seeds, found.over_seeds(), strict=False)
    ]
    curves = [[kind, *(f"{gain:+.3f} / {cost:+.3f}" for _, gain, cost in found.curve(kind))] for kind in kinds]
    rates: list[list[Any]] = []
    for kind in kinds:
        rates.append([kind])
        for rate in plan.rates:
            own = [records.get(own_key(kind, d, plan.steps, rate, plan.seeds[0])) for d in plan.domains]
            rates[-1].append(_mean([one["validation"] for one in own if one]) if all(own) else "")
    wrong = records.get("tenants", {}).get("best wrong expert", {})
    told = {name: value for name, value in records.get("answers", {}).items() if name != "cpu_seconds"}
    sections = [
        ("Success, written down before the first run", "", ("", "measured", "holds"), verdicts),
        ("Nats per token, first seed", "", ("", *texts), of_arms),
        ("Own neurons : own LoRA : composed, every seed", "", ("seed", *plan.domains), seeds),
        (
            "Learnt / forgotten",
            f"One expert of {plan.forgetting}, always on: its gain, and what the probes lose in the mean.",
            ("steps", *lengths),
            curves,
        ),
        ("Tenants", "", ("experts", "share of the gain kept"), gains(plan, records).items()),
        ("With the best of the other experts always on", "", ("", "loss"), wrong.items()),
        ("The base's own answers to eight questions, nats per token", "", ("", ""), told.items()),
        ("Rates", "Validation loss, mean over domains, first seed.", ("", *plan.rates), rates),
    ]
    lines = [f"# {plan.title}", "", plan.question, ""]
    for title, words, header, rows in sections:
        lines += [f"## {title}", "", *([words, ""] if words else []), *_table(header, rows)]
    return "\n".join(lines).rstrip() + "\n"
