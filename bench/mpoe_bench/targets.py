"""Targets on two CPU cores and on an H100, and which of them a run reached.

Numbers are x dense, forward / forward + backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpoe_bench.layers import TOKENS, cases
from mpoe_bench.peers import GROUPED, LOOP, ORIGINAL

PHASES = {"forward": "forward", "train": "forward + backward"}
MOST_MEMORY = 1.2  # of mixtures around a dense network, x dense
TOLERANCE, WANTED_SHARE = (
    1.15,
    0.9,
)  # of the autotuner's choice: x the best measured, and of how many cases


@dataclass(frozen=True)
class Target:
    """One line per phase: what a shape must reach in a case of a feed-forward layer.

    Attributes:
        shape: name of the shape.
        experts, tokens: of the case; of mixtures around a dense network (suite ``layers``) the
            layers instead of the experts, which their names tell.
        forward, train: limits by phase; ``None`` = no limit.
        key, sizes: of the section, and model and hidden size; T5-base's by default.
        peer: ``None``: the limits are the largest x dense allowed. Else a contender (`ORIGINAL`
            stands for the one on the same shape): the shape must be faster than the peer by at
            least these factors.
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
)
# Mixtures around a dense network, router in; the last three read their weights from memory, as in
# decoding.
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
    *(
        Target("separable", experts, tokens, 1.35)
        for experts in (8, 64)
        for tokens in (4096, 32768)
    ),
    Target("paper_32", 64, 64, 3.0, None, GROUPED),
    Target("paper_full", 8, 32768, 1 / 1.3, None, GROUPED),
    *(
        Target(case.name, 1, TOKENS, *case.limits, key="layers", sizes=(case.model, 4 * case.model))
        for case in cases()
    ),
)


def targets_of(backend: str, device: str = "cpu") -> tuple[Target, ...]:
    """The targets that a backend is held to."""
    if device == "cuda":
        return () if backend == "eager" else GPU_TARGETS
    return EAGER_TARGETS if backend == "eager" else (*KERNEL_TARGETS, *LAYER_TARGETS)


def _timed(section: Mapping[str, Any], phase: str, **wanted: Any) -> float | None:
    """``x`` of the first row that was timed in a phase and has these values."""
    rows = (row for row in section["rows"] if row.get(phase))
    return next(
        (row[phase]["x"] for row in rows if all(row.get(k, False) == v for k, v in wanted.items())),
        None,
    )


Judged = Iterator[tuple[str, str, str, bool]]  # what, wanted, found, reached


def _against_limits(section: Mapping[str, Any], row: Mapping[str, Any], device: str) -> Judged:
    case = section["case"]
    number = case.get("experts" if section["key"] == "ffn" else "layers")
    sizes = case.get("model"), case.get("hidden")
    found = section["key"], row.get("shape"), number, case["tokens"], sizes
    for target in () if row.get("masked") else targets_of(row["backend"], device):
        if (target.key, target.shape, target.experts, target.tokens, target.sizes) != found:
            continue
        wide = "" if target.sizes == Target.sizes else f" {target.sizes[0]}x{target.sizes[1]}"
        what = (
            f"{target.shape}{wide}, {'E' if target.key == 'ffn' else 'layers'}={number} "
            f"T={target.tokens}"
        )
        peer = f"{ORIGINAL} ({target.shape})" if target.peer == ORIGINAL else target.peer
        for phase, words in PHASES.items():
            limit, x = getattr(target, phase), (row.get(phase) or {}).get("x")
            if limit is None or x is None:
                continue
            if peer is None:
                yield f"{what}, {words}", f"<= {limit:g} x dense", f"{x:.2f}", x <= limit
            elif (other := _timed(section, phase, name=peer)) is not None:
                wanted = f">= {limit:.3g} x faster"
                yield (
                    f"{what}, {words}, against {target.peer}",
                    wanted,
                    f"{other / x:.2f}",
                    other / x >= limit,
                )


def _against_others(section: Mapping[str, Any], row: Mapping[str, Any], device: str) -> Judged:
    """Masked against unmasked training, and the memory of training against the dense network's or
    dense experts'."""
    case, key, words = section["case"], section["key"], PHASES["train"]
    rows = {each["name"]: each for each in section["rows"] if "train" in (each.get("memory") or {})}
    memory = {name: each["memory"]["train"] for name, each in rows.items()}
    dense = next((name for name, each in rows.items() if each["kind"] == "limit"), None)
    what, own = (
        f"{row.get('shape')}, E={case.get('experts')} T={case['tokens']}, ",
        memory.get(row["name"]),
    )
    whole = _timed(
        section, "train", kind="mpoe", shape=row.get("shape"), backend=row["backend"], masked=False
    )
    if key == "layers" and device == "cpu" and own and dense:
        ratio = (own["peak"] - own["kept"]) / (memory[dense]["peak"] - memory[dense]["kept"])
        what = f"{row['shape']} {case['model']}x{case['hidden']}, memory of {words}"
        yield what, f"<= {MOST_MEMORY:g} x dense", f"{ratio:.2f}", ratio <= MOST_MEMORY
    elif key == "ffn" and row.get("masked") and row.get("train") and whole is not None:
        x = row["train"]["x"]
        yield (
            f"{what}{words}, central masked",
            "less than unmasked",
            f"{x:.2f} of {whole:.2f}",
            x < whole,
        )
    elif key == "ffn" and not row.get("masked") and own and LOOP in rows and case["experts"] >= 4:
        needs = [memory[name]["peak"] + rows[name]["weight_bytes"] for name in (row["name"], LOOP)]
        found = " of ".join(f"{need / 2**20:.0f}" for need in needs)
        yield (
            f"{what}weights + peak of {words}",
            "below dense experts'",
            f"{found} MiB",
            needs[0] < needs[1],
        )


def _choice(section: Mapping[str, Any], _: object, device: str) -> Judged:
    """The autotuner's choices."""
    within, count = sum(row["ratio"] <= TOLERANCE for row in section["rows"]), len(section["rows"])
    what, wanted = (
        f"choice within {TOLERANCE} x the best measured",
        f">= {WANTED_SHARE:.0%} of cases",
    )
    yield what, wanted, f"{within} of {count}", within >= WANTED_SHARE * count


def check_targets(
    sections: Sequence[Mapping[str, Any]], device: str = "cpu"
) -> list[dict[str, Any]]:
    """One line per target that the sections measured: what, backend, wanted, found by dtype,
    reached.

    A target is reached if the worse of its dtypes reaches it.
    """
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for section in sections:
        planner = section["key"] == "planner"
        dtype = "both" if planner else section["case"].get("dtype")
        for row in [section] if planner else [row for row in section["rows"] if row.get("backend")]:
            for judge in (_choice,) if planner else (_against_limits, _against_others):
                for what, wanted, found, reached in judge(section, row, device):
                    made: dict[str, Any] = {
                        "what": what,
                        "backend": row["backend"],
                        "wanted": wanted,
                    }
                    line = lines.setdefault(
                        (what, row["backend"]), {**made, "found": {}, "reached": reached}
                    )
                    if dtype not in line["found"]:
                        line["found"][dtype] = found
                        line["reached"] = reached and line["reached"]
    return sorted(lines.values(), key=lambda line: line["backend"])
