"""Targets on two CPU cores, and which of them a run reached. Numbers are x dense, forward / forward + backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """One line: in every FFN section that matches, the shape's x dense must not exceed the limits.

    Attributes:
        shape: name of the shape.
        experts, tokens: of the section.
        forward, train: limits of x dense; ``None`` = none.
        faster_than: a peer's name; the shape must be ``faster_by`` times faster, forward.
    """

    shape: str
    experts: int
    tokens: int
    forward: float | None = None
    train: float | None = None
    faster_than: str | None = None
    faster_by: float | None = None


TARGETS = (
    Target("separable", 8, 2048, 1.3, 1.45),
    Target("separable", 64, 2048, 1.3, 1.45),
    Target("separable", 64, 64, 2.5),
    Target("light_64", 8, 2048, 1.8, 2.0),
    Target("paper_64", 8, 2048, 1.5, 1.7),
    Target("paper_full", 8, 2048, 3.9, 4.7),
    Target("paper_32", 64, 64, faster_than="dense experts, loop", faster_by=1.2),
    Target("paper_16", 64, 64, faster_than="dense experts, loop", faster_by=2.5),
)


def best_row(rows: Sequence[Mapping[str, Any]], shape: str, phase: str) -> Mapping[str, Any] | None:
    """The fastest unmasked backend of a shape in a section."""
    able = [
        row
        for row in rows
        if row["kind"] == "mpoe" and row.get("shape") == shape and not row.get("masked") and row.get(phase)
    ]
    return min(able, key=lambda row: row[phase]["x"]) if able else None


def _line(what: str, wanted: str, found: str, reached: bool) -> dict[str, Any]:
    return {"what": what, "wanted": wanted, "found": found, "reached": reached}


def _ffn_lines(section: Mapping[str, Any], target: Target) -> Iterator[dict[str, Any]]:
    where = f"{target.shape}, {section['title'].removeprefix('FFN ')}"
    for phase, limit in (("forward", target.forward), ("train", target.train)):
        row = best_row(section["rows"], target.shape, phase)
        if limit is not None and row is not None:
            x, name = row[phase]["x"], {"forward": "forward", "train": "forward + backward"}[phase]
            yield _line(f"{where}: {name}", f"<= {limit:g} x dense", f"{x:.2f} [{row['backend']}]", x <= limit)
    peer = next((row for row in section["rows"] if row["name"] == target.faster_than and row.get("forward")), None)
    row = best_row(section["rows"], target.shape, "forward")
    if peer is not None and row is not None and target.faster_by is not None:
        speed = peer["forward"]["x"] / row["forward"]["x"]
        what = f"{where}: forward, against {target.faster_than}"
        yield _line(what, f">= {target.faster_by:g} x faster", f"{speed:.2f}", speed >= target.faster_by)


def _masked_lines(section: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for row in section["rows"]:
        if row.get("masked") and row.get("train"):
            name = row["name"].replace(", central masked", "")
            whole = next((other for other in section["rows"] if other["name"] == name and other.get("train")), None)
            if whole is not None:
                x, y = row["train"]["x"], whole["train"]["x"]
                what = f"{name}, {section['title'].removeprefix('FFN ')}: central gradient masked"
                yield _line(what, "cheaper than unmasked", f"{x:.2f} against {y:.2f} x dense", x < y)


def _memory_lines(section: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    dense = next((row for row in section["rows"] if row["name"] == "dense experts, loop" and row.get("memory")), None)
    if dense is None or "train" not in dense["memory"]:
        return
    limit = dense["memory"]["train"]["peak"] + dense["weight_bytes"]
    for row in section["rows"]:
        if row["kind"] == "mpoe" and row.get("memory") and not row.get("masked"):
            peak = row["memory"]["train"]["peak"] + row["weight_bytes"]
            what = f"{row['name']}, {section['title'].removeprefix('FFN ')}: weights + peak of a training step"
            found = f"{peak / 2**20:.0f} against {limit / 2**20:.0f} MiB"
            yield _line(what, "below dense experts'", found, peak < limit)


def check_targets(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per target that the sections measured: what, wanted, found, reached."""
    lines = []
    for section in sections:
        if section["key"] == "planner":
            within, count = section["within"], len(section["rows"])
            wanted = f"within {section['tolerance']} x the best in >= {section['wanted_share']:.0%} of the cases"
            reached = within >= section["wanted_share"] * count
            lines.append(_line("planner", wanted, f"{within} of {count}", reached))
        elif section["key"] == "ffn":
            case = section["case"]
            for target in TARGETS:
                if (target.experts, target.tokens) == (case["experts"], case["tokens"]) and case["load"] == "uniform":
                    lines += _ffn_lines(section, target)
            lines += _masked_lines(section)
            lines += _memory_lines(section)
        elif section["key"] == "conversion_t5":
            for row in section["rows"]:
                if row.get("seconds") is not None:
                    lines.append(
                        _line(row["name"], "<= 60 s on 2 cores", f"{row['seconds']:.1f} s", row["seconds"] <= 60)
                    )
    return lines
