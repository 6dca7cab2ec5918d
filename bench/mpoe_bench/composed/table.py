"""The study's table in Markdown, and which lines of its success hold so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpoe_bench.composed.measures import Plan, own_key
from mpoe_bench.study.table import Spread

Records = Mapping[str, Mapping[str, Any]]
# Two-sided 95% quantile of Student's t for many requests.
T_REQUESTS = 2.0


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in cells)} |"


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|---" * len(cells) + "|"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Found:
    """Numbers of the finished runs; ``None`` where one is missing."""

    def __init__(self, plan: Plan, records: Records) -> None:
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


def success(plan: Plan, records: Records) -> list[tuple[str, str, str]]:
    """What must hold, what was measured, the verdict."""
    found, domains = Found(plan, records), plan.domains
    lines: list[tuple[str, str, bool | None]] = []
    seeds, arms, base = found.over_seeds(), found.arms(), records.get("base")
    behind = [_mean([own[d] - lora[d] for d in domains]) for own, lora, _ in seeds]
    lines.append(("own neurons at most .05 behind own LoRA", _told(behind), bool(behind) and _mean(behind) <= 0.05))
    curves = found.curve("neurons"), found.curve("lora")
    pairs = [(cost, _at(curves[1], gain)) for _, gain, cost in curves[0]]
    known = [(ours, theirs) for ours, theirs in pairs if theirs is not None]
    text = "; ".join(f"{ours:+.3f} : {theirs:+.3f}" for ours, theirs in known)
    lines.append(("less forgetting than LoRA at equal learning (neurons : LoRA)", text, all(a < b for a, b in known)))
    kept = {d: _mean([mix[d] - own[d] for own, _, mix in seeds]) for d in domains} if seeds else {}
    lines.append(("composed at most .04 behind own neurons", _told(list(kept.values())), _top(kept, _mean, 0.04)))
    lines.append(("on every domain at most .06", f"{max(kept.values()):+.3f}" if kept else "", _top(kept, max, 0.06)))
    mixture = arms.get("composed of files")
    for name in ("mean of LoRAs", "TIES of LoRAs", "DARE of LoRAs"):
        ahead = [arms[name][d] - mixture[d] for d in domains] if name in arms and mixture else []
        lines.append((f"ahead of {name} by more than .05", _told(ahead), bool(ahead) and _mean(ahead) > 0.05))
    over = [mix[p] - base[p] for _, _, mix in seeds for p in plan.probes] if base else []
    lines.append(
        ("probes at most .01 over the base", f"{max(over):+.3f}" if over else "", bool(over) and max(over) <= 0.01)
    )
    router = arms.get("request router, LoRA")
    if router and mixture:
        pairs_of = zip(router["requests"], mixture["requests"], strict=True)
        spread = Spread.of([theirs - ours for theirs, ours in pairs_of])
        error = (spread.deviation or 0.0) / spread.count**0.5
        words = f"{spread.mean:+.3f} ± {error:.3f} over {spread.count} requests"
        lines.append(
            ("requests that change halfway: ahead of the request router", words, spread.mean > T_REQUESTS * error)
        )
    else:
        lines.append(("requests that change halfway: ahead of the request router", "", None))
    shares = gains(plan, records)
    last = shares[max(shares)] if shares else None
    lines.append(("at least 90% of the gain at ten tenants", f"{last:.0%}" if last else "", last and last >= 0.9))
    return [(what, seen or "waits", ("yes" if holds else "**no**") if seen else "") for what, seen, holds in lines]


def _told(values: Sequence[float]) -> str:
    return f"{_mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})" if values else ""


def _top(kept: Mapping[str, float], of: Any, most: float) -> bool:
    return bool(kept) and of(list(kept.values())) <= most


def gains(plan: Plan, records: Records) -> dict[int, float]:
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


def composed_table(plan: Plan, records: Records) -> str:
    """The whole page."""
    found = Found(plan, records)
    lines = [f"# {plan.title}", "", plan.question, "", "## Success, written down before the first run", ""]
    lines += [*_head(("", "measured", "holds")), *map(_row, success(plan, records)), ""]
    texts = [*plan.domains, *plan.probes, "requests"]
    lines += ["## Nats per token, first seed", "", *_head(("", *texts))]
    for name, losses in found.arms().items():
        cells = [losses.get(text, "") for text in texts]
        lines.append(_row([name, *(_mean(cell) if isinstance(cell, list) else cell for cell in cells)]))
    lines += ["", "## Own neurons, own LoRA, composed: every seed", "", *_head(("seed", *plan.domains))]
    for seed, parts in zip(plan.seeds, found.over_seeds(), strict=False):
        lines.append(_row([seed, *(" : ".join(f"{part[d]:.3f}" for part in parts) for d in plan.domains)]))
    lines += ["", "## Learnt and forgotten", "", f"One expert of {plan.forgetting}, always on: its gain, and what the"]
    lines += ["probes lose in the mean.", "", *_head(("kind", *(str(n) for n in sorted([plan.steps, *plan.lengths]))))]
    for kind in ("neurons", "lora"):
        lines.append(_row([kind, *(f"{gain:+.3f} / {cost:+.3f}" for _, gain, cost in found.curve(kind))]))
    lines += ["", "## Tenants", "", *_head(("experts", "share of the gain kept"))]
    lines += [_row([number, f"{share:.0%}"]) for number, share in gains(plan, records).items()]
    if "tenants" in records:
        wrong = records["tenants"]["best wrong expert"]
        lines += [
            "",
            "Loss with the best of the other experts always on: " + ", ".join(f"{d} {x:.3f}" for d, x in wrong.items()),
        ]
    if "answers" in records:
        told = ", ".join(f"{name} {value:.3f}" for name, value in records["answers"].items() if name != "cpu_seconds")
        lines += ["", f"The base's own answers to eight questions, nats per token: {told}."]
    lines += [
        "",
        "## Rates",
        "",
        "Validation loss, mean over domains, first seed.",
        "",
        *_head(("", *map(str, plan.rates))),
    ]
    for kind in ("neurons", "lora"):
        cells = []
        for rate in plan.rates:
            own = [records.get(own_key(kind, d, plan.steps, rate, plan.seeds[0])) for d in plan.domains]
            cells.append(_mean([one["validation"] for one in own if one]) if all(own) else "")
        lines.append(_row([kind, *cells]))
    return "\n".join(lines).rstrip() + "\n"
