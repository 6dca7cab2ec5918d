"""Targets on two CPU cores and on an H100, and which of them a run reached.

Numbers are x dense, forward / forward + backward.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpoe_bench.layers import LIMIT, TOKENS, Case, cases
from mpoe_bench.peers import GROUPED, LOOP, ORIGINAL

Facts = Mapping[str, Any]  # a section, or a row of one: see `Run`
PHASES = {"forward": "forward", "train": "forward + backward"}
MOST_MEMORY = 1.2  # of mixtures around a dense network, x dense
TOLERANCE = 1.15  # of the autotuner's choice: x the best measured
WANTED_SHARE = 0.9  # of the cases


@dataclass(frozen=True)
class Target:
    """One line per phase: what a shape must reach in a case of a feed-forward layer.

    Attributes:
        shape: name of the shape.
        experts, tokens: of the case; of mixtures around a dense network (suite ``layers``) the
            layers instead of the experts, which their names tell.
        forward, train: limits by phase; ``None`` = no limit.
        sizes: model and hidden size; T5-base's by default.
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
    Target("neurons 8 x 64, 2", 1, 2048, 1.12, 1.2),
    Target("neurons 64 x 64, 8", 1, 2048, 1.35, 1.5),
    Target("neurons 128 x 128, 8", 1, 2048, 1.55, 1.7),
    Target("neurons 64 x 64, 8", 1, 2048, 1.15, 1.2, sizes=(2048, 8192)),
    Target("neurons 8 x 64, 2", 12, 64, 1.25),
    Target("neurons 8 x 64, 2", 12, 1, 1.2),
    Target("neurons 64 x 64, 8", 12, 1, 1.35),
    Target("neurons 128 x 128, 8", 12, 1, 1.55),
)
# On an H100, in bfloat16; eager has no targets there.
GPU_TARGETS = (
    Target("separable", 8, 4096, 1.35),
    Target("separable", 8, 32768, 1.35),
    Target("separable", 64, 4096, 1.35),
    Target("separable", 64, 32768, 1.35),
    Target("paper_32", 64, 64, 3.0, None, GROUPED),
    Target("paper_full", 8, 32768, 1 / 1.3, None, GROUPED),
)


def of_layer(case: Case) -> Target:
    """The target of a layer with its router."""
    sizes = (case.model, 4 * case.model)
    return Target(case.name, 1, TOKENS, *case.limits, sizes=sizes)


def targets_of(backend: str, device: str = "cpu") -> tuple[Target, ...]:
    """The targets that a backend is held to."""
    if device == "cpu":
        return EAGER_TARGETS if backend == "eager" else KERNEL_TARGETS + LAYER_TARGETS
    return () if backend == "eager" else GPU_TARGETS + tuple(map(of_layer, cases()))


def _timed(section: Facts, phase: str, **wanted: Any) -> float | None:
    """``x`` of the first row that was timed in a phase and has these values."""
    for row in section["rows"]:
        facts = {name: row.get(name, False) for name in wanted}
        if row.get(phase) and facts == wanted:
            return row[phase]["x"]
    return None


Judged = Iterator[tuple[str, str, str, bool]]  # what, wanted, found, reached


def _against_limits(section: Facts, row: Facts, device: str) -> Judged:
    case = section["case"]
    counted = "layers"
    number = case.get(counted)
    if section["key"] == "ffn":
        counted = "E"
        number = case["experts"]
    place = row.get("shape"), number, case["tokens"], (case.get("model"), case.get("hidden"))
    if row.get("masked"):
        return
    for target in targets_of(row["backend"], device):
        if (target.shape, target.experts, target.tokens, target.sizes) != place:
            continue
        model, hidden = target.sizes
        wide = "" if target.sizes == Target.sizes else f" {model}x{hidden}"
        what = f"{target.shape}{wide}, {counted}={number} T={target.tokens}"
        peer = f"{ORIGINAL} ({target.shape})" if target.peer == ORIGINAL else target.peer
        for phase, words in PHASES.items():
            limit = getattr(target, phase)
            if limit is None or phase not in row:
                continue
            x = row[phase]["x"]
            if peer is None:
                yield f"{what}, {words}", f"<= {limit:g} x dense", f"{x:.2f}", x <= limit
            elif (other := _timed(section, phase, name=peer)) is not None:
                faster = other / x
                named = f"{what}, {words}, against {target.peer}"
                yield named, f">= {limit:.3g} x faster", f"{faster:.2f}", faster >= limit


def _against_others(section: Facts, row: Facts, device: str) -> Judged:
    """Masked against unmasked training, and the memory of training against the dense network's or
    dense experts'."""
    case = section["case"]
    words = PHASES["train"]
    shape = row.get("shape")
    trained = {
        other["name"]: other for other in section["rows"] if "train" in other.get("memory", {})
    }
    if section["key"] == "layers" and device == "cpu" and {LIMIT, row["name"]} <= trained.keys():
        ratio = _temporary(row) / _temporary(trained[LIMIT])
        what = f"{shape} {case['model']}x{case['hidden']}, memory of {words}"
        yield what, f"<= {MOST_MEMORY:g} x dense", f"{ratio:.2f}", ratio <= MOST_MEMORY
    if section["key"] != "ffn":
        return
    what = f"{shape}, E={case['experts']} T={case['tokens']}"
    if row.get("masked"):
        ours = {"kind": "mpoe", "shape": shape, "backend": row["backend"], "masked": False}
        whole = _timed(section, "train", **ours)
        if row.get("train") and whole is not None:
            x = row["train"]["x"]
            what += f", {words}, central masked"
            yield what, "less than unmasked", f"{x:.2f} of {whole:.2f}", x < whole
    elif {LOOP, row["name"]} <= trained.keys() and case["experts"] >= 4:
        experts = _largest(row)
        loop = _largest(trained[LOOP])
        what += f", weights + peak of {words}"
        yield what, "below dense experts'", f"{experts:.0f} of {loop:.0f} MiB", experts < loop


def _temporary(row: Facts) -> float:
    """Bytes of a training pass that its end does not keep."""
    memory = row["memory"]["train"]
    return memory["peak"] - memory["kept"]


def _largest(row: Facts) -> float:
    """MiB of a training pass, weights in."""
    return (row["memory"]["train"]["peak"] + row["weight_bytes"]) / 2**20


def _choice(section: Facts) -> Judged:
    """The autotuner's choices."""
    count = len(section["rows"])
    within = sum(row["ratio"] <= TOLERANCE for row in section["rows"])
    what = f"choice within {TOLERANCE} x the best measured"
    wanted = f">= {WANTED_SHARE:.0%} of cases"
    yield what, wanted, f"{within} of {count}", within >= WANTED_SHARE * count


def _judged(section: Facts, device: str) -> Iterator[tuple[str, str | None, Judged]]:
    """Backend, dtype and what was judged, of the rows of a section."""
    if section["key"] == "planner":
        yield section["backend"], "both", _choice(section)
        return
    for row in section["rows"]:
        if row.get("backend"):
            dtype = section["case"].get("dtype")
            yield row["backend"], dtype, _against_limits(section, row, device)
            yield row["backend"], dtype, _against_others(section, row, device)


def check_targets(sections: Sequence[Facts], device: str = "cpu") -> list[dict]:
    """One line per target that the sections measured: what, backend, wanted, found by dtype,
    reached.

    A target is reached if the worse of its dtypes reaches it.
    """
    lines = {}
    for section in sections:
        for backend, dtype, judged in _judged(section, device):
            for what, wanted, measured, reached in judged:
                line = lines.setdefault((what, backend), {"found": {}, "reached": True})
                line |= {"what": what, "backend": backend, "wanted": wanted}
                if dtype not in line["found"]:
                    line["found"][dtype] = measured
                    line["reached"] &= reached
    return sorted(lines.values(), key=lambda line: line["backend"])
