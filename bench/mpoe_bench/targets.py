"""Targets on two CPU cores and on an H100, and which of them a run reached.

Numbers are x dense, forward / forward + backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PHASES = {"forward": "forward", "train": "forward + backward"}
DTYPES = ("float32", "bfloat16")
LOOP, ORIGINAL = "dense experts, loop", "original: rebuild all"
GROUPED = "dense experts, grouped_mm"
MOST_MEMORY = 1.2  # of mixtures around a dense network, x dense


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
    """By dtype, the first section of a target's case: T5-base's sizes, and uniform load."""
    wanted: dict[str, Any] = {"tokens": target.tokens, "model": target.sizes[0], "hidden": target.sizes[1]}
    wanted |= {"experts": target.experts, "load": "uniform"} if target.key == "ffn" else {"layers": target.experts}
    found: dict[str, Mapping[str, Any]] = {}
    for section in sections:
        if section["key"] == target.key and all(section["case"][key] == value for key, value in wanted.items()):
            found.setdefault(section["case"]["dtype"], section)
    return found


def _target_lines(sections: Sequence[Mapping[str, Any]], target: Target, backend: str) -> Iterator[dict[str, Any]]:
    cases = _cases(sections, target)
    for phase in PHASES:
        limit = getattr(target, phase)
        values, texts = [], {}
        for dtype, section in cases.items():
            row = _row(section, phase, kind="mpoe", shape=target.shape, backend=backend, masked=False)
            if limit is None or row is None:
                continue
            value, texts[dtype] = row[phase]["x"], f"{row[phase]['x']:.2f}"
            if target.peer is not None:
                name = f"{ORIGINAL} ({target.shape})" if target.peer == ORIGINAL else target.peer
                peer = _row(section, phase, name=name)
                if peer is None:
                    del texts[dtype]
                    continue
                value = peer[phase]["x"] / row[phase]["x"]
                texts[dtype] = f"{value:.2f}"
            values.append(value)
        if not values:
            continue
        number = "E" if target.key == "ffn" else "layers"
        wide = "" if target.sizes == Target.sizes else f" {target.sizes[0]}x{target.sizes[1]}"
        what = f"{target.shape}{wide}, {number}={target.experts} T={target.tokens}, {PHASES[phase]}"
        if target.peer is None:
            yield _line(what, backend, f"<= {limit:g} x dense", texts, max(values) <= limit)
        else:
            what += f", against {target.peer}"
            reported = limit == 0.0
            wanted = "reported" if reported else f">= {limit:.3g} x faster"
            yield _line(what, backend, wanted, texts, None if reported else min(values) >= limit)


def _masked_lines(sections: Sequence[Mapping[str, Any]], backend: str) -> Iterator[dict[str, Any]]:
    """Masked against unmasked, in every case where a masked contender was trained."""
    for section in sections:
        for row in section["rows"]:
            if not (row.get("masked") and row.get("train") and row.get("backend") == backend):
                continue
            whole = _row(section, "train", kind="mpoe", shape=row["shape"], backend=backend, masked=False)
            if whole is not None:
                case = section["case"]
                masked, unmasked = row["train"]["x"], whole["train"]["x"]
                what = f"{row['shape']}, E={case['experts']} T={case['tokens']}, forward + backward, central masked"
                texts = {case["dtype"]: f"{masked:.2f} of {unmasked:.2f}"}
                yield _line(what, backend, "less than unmasked", texts, masked < unmasked)


def _memory_lines(sections: Sequence[Mapping[str, Any]], backend: str) -> Iterator[dict[str, Any]]:
    """Weights and peak of a training step, against the dense experts'."""
    for section in sections:
        dense = next((row for row in section["rows"] if row["name"] == LOOP and row.get("memory")), None)
        if section["key"] != "ffn" or dense is None or "train" not in dense["memory"] or section["case"]["experts"] < 4:
            continue
        limit = dense["memory"]["train"]["peak"] + dense["weight_bytes"]
        for row in section["rows"]:
            if row.get("backend") == backend and row.get("memory") and not row.get("masked"):
                peak = row["memory"]["train"]["peak"] + row["weight_bytes"]
                case = section["case"]
                what = f"{row['shape']}, E={case['experts']} T={case['tokens']}, weights + peak of forward + backward"
                texts = {case["dtype"]: f"{peak / 2**20:.0f} of {limit / 2**20:.0f} MiB"}
                yield _line(what, backend, "below dense experts'", texts, peak < limit)


def _layer_memory_lines(sections: Sequence[Mapping[str, Any]], backend: str) -> Iterator[dict[str, Any]]:
    """What forward and backward need beyond weights and gradients, many tokens, against the dense network's."""
    for section in sections:
        if section["key"] != "layers" or section["case"]["layers"] > 1:
            continue
        rows = [row for row in section["rows"] if "train" in (row.get("memory") or {})]
        needs = {row["name"]: row["memory"]["train"]["temporary"] for row in rows}
        dense = next(needs[row["name"]] for row in rows if row["kind"] == "limit")
        for row in rows:
            if row.get("backend") == backend:
                ratio = needs[row["name"]] / dense
                case = section["case"]
                what = f"{row['shape']} {case['model']}x{case['hidden']}, memory of forward + backward"
                texts = {case["dtype"]: f"{ratio:.2f}"}
                yield _line(what, backend, f"<= {MOST_MEMORY:g} x dense", texts, ratio <= MOST_MEMORY)


def check_targets(sections: Sequence[Mapping[str, Any]], device: str = "cpu") -> list[dict[str, Any]]:
    """One line per target that the sections measured: what, backend, wanted, found by dtype, reached.

    A target is reached if the worse of its dtypes reaches it.
    """
    backends = dict.fromkeys(row["backend"] for section in sections for row in section["rows"] if row.get("backend"))
    lines: list[dict[str, Any]] = []
    ffn = [section for section in sections if section["key"] == "ffn"]
    for backend in backends:
        for target in targets_of(backend, device):
            lines += _target_lines(sections, target, backend)
        lines += _masked_lines(ffn, backend)
        lines += _memory_lines(ffn, backend)
        lines += _layer_memory_lines(sections, backend)
    for section in sections:
        if section["key"] == "planner":
            within, count = section["within"], len(section["rows"])
            wanted = f">= {section['wanted_share']:.0%} of cases"
            what = f"choice within {section['tolerance']} x the best measured"
            reached = within >= section["wanted_share"] * count
            lines.append(_line(what, section["backend"], wanted, {"both": f"{within} of {count}"}, reached))
    return lines
