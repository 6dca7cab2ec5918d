"""Explains in words and numbers why a strategy was chosen and the others were not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpoe_kernels.planner.contraction import Contraction
from mpoe_kernels.planner.hardware import Hardware

# Kinds of reasons.
MORE_FLOPS = "FLOPs"
GEMM_SIZES = "GEMM sizes"
MORE_BYTES = "bytes"
OVERHEAD = "overhead"
TEMPORARY = "temporary memory"
SAVED = "saved for backward"
NOTHING = "nothing to do"
EQUAL = "equal"


@dataclass(frozen=True)
class Loss:
    """A strategy that was not chosen.

    Attributes:
        contraction: the contraction that was not chosen.
        seconds: its predicted time.
        kind: the deciding reason: more ``FLOPs``, smaller ``GEMM sizes`` (fewer FLOP/s), more ``bytes`` to move, more
            ``overhead`` of calls, too much ``temporary memory``, ``saved for backward`` (the chosen forward saves what
            the backward needs), ``equal`` (a tie, decided by the order of `STRATEGIES`), or ``nothing to do``.
        text: the same in words, with numbers.
    """

    contraction: Contraction
    seconds: float
    kind: str
    text: str


def format_seconds(seconds: float) -> str:
    """``1.23 ms``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def format_bytes(count: float) -> str:
    """``1.23 MB``, powers of ten."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def format_flops(count: float) -> str:
    """``1.23 GFLOP``."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count:.0f} FLOP"


def _rate(contraction: Contraction, seconds: float) -> str:
    return f"{format_flops(contraction.flops / seconds) if seconds else '0 FLOP'}/s"


def lost_on_time(loser: Contraction, winner: Contraction, hardware: Hardware) -> Loss:
    """A loss on time; the reason is the component of the time in which the loser is furthest behind."""
    ours, theirs = winner.parts(hardware), loser.parts(hardware)
    seconds, best = sum(theirs), sum(ours)
    if not loser.steps:
        return Loss(loser, seconds, NOTHING, "no rows: nothing to compute")
    if seconds <= best * (1 + 1e-9):
        return Loss(loser, seconds, EQUAL, f"{format_seconds(seconds)}, as much as {winner.strategy}")
    behind = [t - o for t, o in zip(theirs, ours, strict=True)]
    worst = behind.index(max(behind))
    if worst == 2:
        kind = OVERHEAD
        text = f"{loser.calls} GEMM calls against {winner.calls}, {format_seconds(theirs[2])} against "
        text += format_seconds(ours[2])
    elif worst == 0 and loser.flops > 1.02 * winner.flops:
        kind, text = MORE_FLOPS, f"{format_flops(loser.flops)} against {format_flops(winner.flops)}"
    elif worst == 0:
        kind = GEMM_SIZES
        text = f"smaller GEMMs, {_rate(loser, seconds)} against {_rate(winner, best)}"
    else:
        kind = MORE_BYTES
        text = f"waits {format_seconds(theirs[1])} for {format_bytes(loser.bytes)}, against "
        text += f"{format_seconds(ours[1])} for {format_bytes(winner.bytes)}"
    slower = f"{format_seconds(seconds)} ({seconds / best:.3g}x)" if best else format_seconds(seconds)
    return Loss(loser, seconds, kind, f"{slower}: {text}")


def lost_on_memory(loser: Contraction, hardware: Hardware) -> Loss:
    """A loss because the temporary weights exceed two experts' weights."""
    one = loser.dims.weight_elements * loser.dtype.itemsize
    text = f"{format_bytes(loser.temporary_bytes)} of temporary weights, above two experts' {format_bytes(2 * one)}"
    return Loss(loser, loser.seconds(hardware), TEMPORARY, text)


def lost_on_saving(loser: Contraction, winner: Contraction, hardware: Hardware) -> Loss:
    """A loss because the forward of a separable shape saves its central step's result whenever gradients are needed."""
    seconds = loser.seconds(hardware)
    text = f"{format_seconds(seconds)}: a {winner.strategy} forward keeps what every {winner.strategy} backward reads"
    return Loss(loser, seconds, SAVED, text)


_COLUMNS = ("", "rows meet", "work", "x dense", "moved", "temporary", "FLOP/byte", "predicted")


def _cells(contraction: Contraction, hardware: Hardware, dense_flops: float, mark: str) -> tuple[str, ...]:
    c = contraction
    return (
        f"{mark} {c.strategy}",
        ", ".join(c.order),
        format_flops(c.flops),
        f"{c.flops / dense_flops:.3g}" if dense_flops else "-",
        format_bytes(c.bytes),
        format_bytes(c.temporary_bytes),
        f"{c.flops / max(c.memory_bytes(hardware), 1):,.1f}",
        format_seconds(c.seconds(hardware)),
    )


def describe_phase(chosen: Contraction, losses: Sequence[Loss], hardware: Hardware, dense_flops: float) -> list[str]:
    """Text with the choice and its bottleneck, a table of all candidates, and one line for every loser."""
    if chosen.steps:
        parts = zip(chosen.parts(hardware), ("arithmetic", "memory", "overhead of calls"), strict=True)
        lines = [f"{chosen.phase}: {chosen.strategy}, bound by {max(parts)[1]}"]
        rows = [_COLUMNS, _cells(chosen, hardware, dense_flops, ">")]
        rows += [_cells(loss.contraction, hardware, dense_flops, " ") for loss in losses]
        widths = [max(len(row[k]) for row in rows) for k in range(len(_COLUMNS))]
        for row in rows:  # words to the left, numbers to the right
            cells = [
                cell.ljust(w) if k < 2 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells))
    else:
        lines = [f"{chosen.phase}: {chosen.strategy}; no rows, nothing to compute"]
    return lines + [f"  not {loss.contraction.strategy}, {loss.kind}: {loss.text}" for loss in losses]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
