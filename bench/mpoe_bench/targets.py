"""Targets on two CPU cores and on an H100, and which of them a run reached.

Numbers are x dense, forward / forward + backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpoe_bench.gpu_cases import TOKENS, cases

PHASES = {"forward": "forward", "train": "forward + backward"}
DTYPES = ("float32", "bfloat16")
LOOP, ORIGINAL = "dense experts, loop", "original: rebuild all"
GROUPED = "dense experts, grouped_mm"
MOST_MEMORY = 1.2  # of mixtures around a dense network, x dense
TOLERANCE, WANTED_SHARE = 1.15, 0.9  # of the autotuner's choice: x the best measured, and of how many cases


@dataclass(frozen=True)
class Target:
    """One line per phase: what a shape must reach in a case of a feed-forward layer.

    Attributes:
        shape: name of the shape.
        experts, tokens: of the case; of mixtures around a dense network (suite ``layers``) the layers instead of the
            experts, which their names tell.
        forward, train: limits by phase; ``None`` = no limit.
        key, sizes: of the section, and model and hidden size; T5-base's by default.
        peer: ``None``: the limits are the largest x dense allowed. Else a contender (`ORIGINAL` stands for the one on
            the same shape): the shape must be faster than the peer by at least these factors.
    """

    shape: str
    experts: int
    tokens: int
    forward: float | None = None
    train: float | None = None
    peer: str | None = None
    key: str = "ffn"
    sizes: tuple[int, int] = (768, 3072)


# For plain PyTorch; then for backends with their own kernels and for the choice among all backends.
EAGER_TARGETS = (
    Target("separable", 8, 2048, 1.5, 1.6),
    Target("separable", 64, 2048, 1.5, 1.6),
    Target("paper_64", 8, 2048, 1.3, 1.3, ORIGINAL),
    Target("paper_full", 8, 2048, 1.0, 1.0, ORIGINAL),
)
KERNEL_TARGETS = (
    Target("separable", 8, 2048, 1.3, 1.45),
    Target("separable", 64, 2048, 1.3, 1.45),
    Target("separable", 64, 64, 2.5),
    Target("light_64", 8, 2048, 1.8, 2.0),
    Target("paper_64", 8, 2048, 1.5, 1.7),
    Target("paper_full", 8, 2048, 3.9, 4.7),
    Target("paper_32", 64, 64, 1.2, None, LOOP),
    Target("paper_16", 64, 64, 2.5, None, LOOP),
    Target("paper_64", 64, 64, 0.0, None, LOOP),  # reported only
)
# Mixtures around a dense network, router in; the last three read their weights from memory, as in decoding.
LAYER_TARGETS = (
    Target("neurons 8 x 64, 2", 1, 2048, 1.12, 1.2, key="layers"),
    Target("neurons 64 x 64, 8", 1, 2048, 1.35, 1.5, key="layers"),
    Target("neurons 128 x 128, 8", 1, 2048, 1.55, 1.7, key="layers"),
    Target("neurons 64 x 64, 8", 1, 2048, 1.15, 1.2, key="layers", sizes=(2048, 8192)),
    Target("neurons 8 x 64, 2", 12, 64, 1.25, key="layers"),
    Target("neurons 8 x 64, 2", 12, 1, 1.2, key="layers"),
    Target("neurons 64 x 64, 8", 12, 1, 1.35, key="layers"),
    Target("neurons 128 x 128, 8", 12, 1, 1.55, key="layers"),
)
# On an H100, in bfloat16; eager has no targets there.
GPU_TARGETS = (
    *(Target("separable", experts, tokens, 1.35) for experts in (8, 64) for tokens in (4096, 32768)),
    Target("paper_32", 64, 64, 3.0, None, GROUPED),
    Target("paper_full", 8, 32768, 1 / 1.3, None, GROUPED),
    *(Target(case.name, 1, TOKENS, *case.limits, key="layers", sizes=(case.model, 4 * case.model)) for case in cases()),
)


def targets_of(backend: str, device: str = "cpu") -> tuple[Target, ...]:
    """The targets that a backend is held to."""
    if device == "cuda":
        return () if backend == "eager" else GPU_TARGETS
    return EAGER_TARGETS if backend == "eager" else (*KERNEL_TARGETS, *LAYER_TARGETS)


def _line(what: str, backend: str, wanted: str, found: Mapping[str, str], reached: bool | None) -> dict[str, Any]:
    """``found`` is by dtype; ``reached`` is ``None`` if the line is only reported."""
    return {"what": what, "backend": backend, "wanted": wanted, "found": dict(found), "reached": reached}


def _row(section: Mapping[str, Any], phase: str, **wanted: Any) -> Mapping[str, Any] | None:
    """The first row that was timed in a phase and has these values."""
    for row in section["rows"]:
        if row.get(phase) and all(row.get(key, False) == value for key, value in wanted.items()):
            return row
    return None


def _cases(sections: Sequence[Mapping[str, Any]], target: Target) -> dict[str, Mapping[str, Any]]:
    """By dtype, the first section of a target's case."""
    number = "experts" if target.key == "ffn" else "layers"
    wanted: dict[str, Any] = {"tokens": target.tokens, number: target.experts}
    wanted |= {"model": target.sizes[0], "hidden": target.sizes[1]}
    found: dict[str, Mapping[str, Any]] = {}
    for section in sections:
        if section["key"] == target.key and all(section["case"][key] == value for key, value in wanted.items()):
            found.setdefault(section["case"]["dtype"], section)
    return found


def _target_lines(sections: Sequence[Mapping[str, Any]], target: Target, backend: str) -> Iterator[dict[str, Any]]:
    cases = _cases(sections, target)
    peer = f"{ORIGINAL} ({target.shape})" if target.peer == ORIGINAL else target.peer
    for phase, words in PHASES.items():
        limit = getattr(target, phase)
        values = {}
        for dtype, section in cases.items():
            row = _row(section, phase, kind="mpoe", shape=target.shape, backend=backend, masked=False)
            other = row if peer is None else _row(section, phase, name=peer)
            if row is not None and other is not None:
                values[dtype] = row[phase]["x"] if peer is None else other[phase]["x"] / row[phase]["x"]
        if limit is None or not values:
            continue
        texts = {dtype: f"{value:.2f}" for dtype, value in values.items()}
        number = "E" if target.key == "ffn" else "layers"
        wide = "" if target.sizes == Target.sizes else f" {target.sizes[0]}x{target.sizes[1]}"
        what = f"{target.shape}{wide}, {number}={target.experts} T={target.tokens}, {words}"
        if peer is None:
            yield _line(what, backend, f"<= {limit:g} x dense", texts, max(values.values()) <= limit)
        else:
            wanted = f">= {limit:.3g} x faster" if limit else "reported"
            reached = min(values.values()) >= limit if limit else None
            yield _line(f"{what}, against {target.peer}", backend, wanted, texts, reached)


def _section_lines(section: Mapping[str, Any], backend: str, device: str) -> Iterator[dict[str, Any]]:
    """Masked against unmasked training, and the memory of training."""
    case, rows = section["case"], [row for row in section["rows"] if row.get("backend") == backend]
    memory = {row["name"]: row["memory"]["train"] for row in section["rows"] if "train" in row.get("memory", {})}
    dense = next((row["name"] for row in section["rows"] if row["kind"] == "limit"), None)
    loop = next((row for row in section["rows"] if row["name"] == LOOP and LOOP in memory), None)
    for row in rows:
        needs, what = memory.get(row["name"]), f"{row.get('shape')}, E={case.get('experts')} T={case.get('tokens')}"
        whole = _row(section, "train", kind="mpoe", shape=row.get("shape"), backend=backend, masked=False)
        if section["key"] == "layers" and device == "cpu" and needs and dense in memory:
            ratio = (needs["peak"] - needs["kept"]) / (memory[dense]["peak"] - memory[dense]["kept"])
            what = f"{row['shape']} {case['model']}x{case['hidden']}, memory of forward + backward"
            found = {case["dtype"]: f"{ratio:.2f}"}
            yield _line(what, backend, f"<= {MOST_MEMORY:g} x dense", found, ratio <= MOST_MEMORY)
        elif section["key"] == "ffn" and row.get("masked") and row.get("train") and whole is not None:
            x, without = row["train"]["x"], whole["train"]["x"]
            what += f", {PHASES['train']}, central masked"
            yield _line(what, backend, "less than unmasked", {case["dtype"]: f"{x:.2f} of {without:.2f}"}, x < without)
        elif section["key"] == "ffn" and not row.get("masked") and needs and loop is not None and case["experts"] >= 4:
            what += f", weights + peak of {PHASES['train']}"
            peak, most = (memory[each["name"]]["peak"] + each["weight_bytes"] for each in (row, loop))
            found = {case["dtype"]: f"{peak / 2**20:.0f} of {most / 2**20:.0f} MiB"}
            yield _line(what, backend, "below dense experts'", found, peak < most)


def check_targets(sections: Sequence[Mapping[str, Any]], device: str = "cpu") -> list[dict[str, Any]]:
    """One line per target that the sections measured: what, backend, wanted, found by dtype, reached.

    A target is reached if the worse of its dtypes reaches it.
    """
    backends = dict.fromkeys(row["backend"] for section in sections for row in section["rows"] if row.get("backend"))
    lines: list[dict[str, Any]] = []
    for backend in backends:
        lines += [line for target in targets_of(backend, device) for line in _target_lines(sections, target, backend)]
        lines += [
            line for section in sections if "case" in section for line in _section_lines(section, backend, device)
        ]
    for section in sections:
        if section["key"] == "planner":
            within, count = sum(row["ratio"] <= TOLERANCE for row in section["rows"]), len(section["rows"])
            what, wanted = f"choice within {TOLERANCE} x the best measured", f">= {WANTED_SHARE:.0%} of cases"
            found = {"both": f"{within} of {count}"}
            lines.append(_line(what, section["backend"], wanted, found, within >= WANTED_SHARE * count))
    return lines
