"""What a feed-forward layer costs on an H100 before and after launch plans: launches, grids, host time, bytes.

    python tools/layer_table.py [--doc]

T5-base's layer in every shape of the catalogue, 4,096 tokens, bfloat16, both projections, forward and backward.
Launches are recorded, bytes and times are predicted by the model of `tools/triton_predict.py`, host times come from
`tools/host_time.py`; nothing runs on a GPU. *Before* is commit e1aa197, recorded in the same way on the same machine
and predicted by today's model; its rows are kept in bench/results/ahead-of-time/layers_e1aa197.json. A second table
covers gated networks: both projections of the same rows, computed separately and multiplied by PyTorch, or together. A
third covers the last product when nothing trains. ``--doc`` writes the tables into layers.md in
bench/results/ahead-of-time, ``--doc placed`` only the third, which needs no idle machine: it contains no host times.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import host_time
from documents import write_between
from triton_predict import ACTIVATIONS, ARCHITECTURE, CARD, DTYPE, choice, layer, predict

from mpoe_kernels.backends import triton_catalogue as catalogue
from mpoe_kernels.backends.triton_work import PRODUCTS
from mpoe_kernels.contract.autotune import cheaper_together
from mpoe_kernels.linear.triton.cost import gated_price_on
from mpoe_kernels.contract import BlockDims, contractions
from mpoe_kernels.contract.program import PHASES
from mpoe_kernels.triton.start import Launch, recorded

FOLDER = Path(__file__).resolve().parents[1] / "bench" / "results" / "ahead-of-time"
BEFORE, PAGE = FOLDER / "layers_e1aa197.json", FOLDER / "layers.md"
EXPERTS, TOKENS = (8, 64), 4096


class Row(NamedTuple):
    """One layer in one phase.

    Attributes:
        launches: number of launches.
        programs: programs in the smallest grid among the launches that multiply.
        host: host time in microseconds.
        megabytes: megabytes moved.
        microseconds: predicted GPU time.
    """

    launches: int
    programs: int
    host: float
    megabytes: float
    microseconds: float


def row(launches: list[Launch], experts: int, host: float) -> Row:
    """The row of the recorded launches."""
    found = [predict(launch, experts, TOKENS) for launch in launches]
    grids = [math.prod(one.grid) for one in launches if one.kernel.fn.__name__ in PRODUCTS]
    moved, seconds = sum(one.bytes for one in found), sum(one.seconds for one in found)
    return Row(len(found), min(grids), host, moved / 1e6, seconds * 1e6)


def cases() -> Iterator[tuple[int, str, str]]:
    """Experts, shape, phase."""
    for experts in EXPERTS:
        for name in catalogue.shapes():
            for phase in PHASES:
                yield experts, name, phase


def key(experts: int, name: str, phase: str) -> str:
    """A case's key in the file of rows."""
    return f"{name}, {experts} experts, {phase}"


Works = list[Callable[[], object]]


def works_of(experts: int, name: str, phase: str) -> tuple[list[Launch], Works]:
    """What a case launches in the current tree, and the functions that launch it."""
    strategies, launches = layer(name, experts, TOKENS, phase)
    return launches, [
        catalogue.WORK[phase](
            *(catalogue.dims_of(shape), experts, TOKENS, DTYPE, strategy, activation), indexed=direction == "up"
        )
        for (direction, activation), shape, strategy in zip(
            ACTIVATIONS.items(), catalogue.shapes()[name], strategies, strict=True
        )
    ]


def hosts(works: Iterable[Works]) -> list[float]:
    """Host time of each case in microseconds."""
    with host_time.stand_ins():
        return host_time.microseconds([host_time.together(each) for each in works])


def now() -> list[Row]:
    """Rows of all cases in the current tree."""
    found = [works_of(*case) for case in cases()]
    times = hosts(works for _, works in found)
    return [row(launches, case[0], time) for case, (launches, _), time in zip(cases(), found, times, strict=True)]


def strategy_together(dims: BlockDims, experts: int, alone: float) -> str | None:
    """What `mpoe_kernels.contract.autotune` decides on the card if each projection alone takes ``alone`` seconds."""
    prices = {
        plan.strategy: gated_price_on(plan, CARD) for plan in contractions(dims, experts, TOKENS, DTYPE, "forward")
    }
    return cheaper_together({name: price.together - price.multiplying for name, price in prices.items()}, alone)


class Way(NamedTuple):
    """One way to compute both projections of a gated network.

    Attributes:
        strategy: name of the strategy.
        row: its row, without the host time.
        works: the functions that launch it.
    """

    strategy: str
    row: Row
    works: Works


def gated(experts: int, name: str) -> tuple[Way, Way]:
    """Both projections of a gated network, forward: separately, and as the backend computes them."""
    dims = catalogue.dims_of(catalogue.shapes()[name][0])
    alone = choice(dims, experts, TOKENS, "forward")
    sizes = dims, experts, TOKENS, DTYPE
    found = []
    for together in (None, strategy_together(dims, experts, alone.seconds)):
        if together is not None:
            works: Works = [catalogue.gated_work(*sizes, together)]
        else:
            works = [catalogue.forward_work(*sizes, alone.strategy, activation) for activation in ("silu", "none")]
        with recorded(ARCHITECTURE) as launches:
            for work in works:
                work()
        one = row(launches, experts, math.nan)
        if len(works) == 2:  # PyTorch multiplies the two results
            moved = 3 * TOKENS * dims.out_features * DTYPE.itemsize
            seconds = CARD.launch_seconds + moved / CARD.bandwidth
            one = one._replace(launches=one.launches + 1, megabytes=one.megabytes + moved / 1e6)
            one = one._replace(microseconds=one.microseconds + seconds * 1e6)
        found.append(Way(together or alone.strategy, one, works))
    return found[0], found[1]


def gated_table() -> str:
    """Markdown: separate → as the backend computes it; PyTorch's product is not part of the host time."""
    lines = [
        "| experts | shape | strategies | launches | programs of the smallest grid | host us | MB | predicted us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = [(experts, name, *gated(experts, name)) for experts in EXPERTS for name in catalogue.shapes()]
    times = iter(hosts(way.works for _, _, *ways in found for way in ways))
    for experts, name, *ways in found:
        apart, done = (way.row._replace(host=next(times)) for way in ways)
        strategy, other = (way.strategy for way in ways)
        if apart.launches == done.launches:  # the backend keeps them separate
            lines.append(f"| {experts} | {name} | {strategy} | {' | '.join(f'{b:,.0f}' for b in apart)} |")
            continue
        pairs = [f"{b:,.0f} → {a:,.0f}" for b, a in zip(apart, done, strict=True)]
        lines.append(f"| {experts} | {name} | {strategy} → {other} together | {' | '.join(pairs)} |")
    return "\n".join(lines)


def placed_table() -> str:
    """Markdown: the last product and `combine` → both in the product's launches."""
    lines = ["| experts | shape | strategy | launches | MB | predicted us |", "|---|---|---|---|---|---|"]
    for experts in EXPERTS:
        for name, (_, down) in catalogue.shapes().items():
            sizes = catalogue.dims_of(down), experts, TOKENS, DTYPE
            strategy = choice(*sizes[:3], "forward").strategy
            product = partial(catalogue.forward_work, *sizes, strategy, indexed=False)
            found = []
            for works in ((product(), catalogue.combine_work(*sizes)), (product(placed=True),)):
                with recorded(ARCHITECTURE) as launches:
                    for work in works:
                        work()
                found.append(row(launches, experts, 0.0))
            apart, placed = found
            pairs = [
                f"{getattr(apart, column):,.0f} → {getattr(placed, column):,.0f}"
                for column in ("launches", "megabytes", "microseconds")
            ]
            lines.append(f"| {experts} | {name} | {strategy} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def table(rows: Iterable[tuple[tuple[int, str, str], Row, Row]]) -> str:
    """Markdown: before → after."""
    lines = [
        "| experts | shape | | launches | programs of the smallest grid | host us | MB | predicted us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (experts, name, phase), before, after in rows:
        pairs = [f"{b:,.0f} → {a:,.0f}" for b, a in zip(before, after, strict=True)]
        lines.append(f"| {experts} | {name} | {phase} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--doc", nargs="?", choices=("all", "placed"), const="all", help="write all tables, or one, into bench/results"
    )
    chosen = parser.parse_args(words)
    if chosen.doc == "placed":
        write_between(PAGE, "placed", placed_table())
        return 0
    before = {name: Row(*values) for name, values in json.loads(BEFORE.read_text()).items()}
    found = table(zip(cases(), [before[key(*case)] for case in cases()], now(), strict=True))
    if chosen.doc:
        write_between(PAGE, "layers", f"{found}\n{host_time.made_on()}")
        write_between(PAGE, "gated", gated_table())
        write_between(PAGE, "placed", placed_table())
    else:
        print(found, gated_table(), placed_table(), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
