"""Results as rows of text: the terminal and the report show the same cells."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean, median
from typing import NamedTuple

from mpoe_bench.targets import TOLERANCE, Facts

HOW_TO_READ = (
    "x dense: time over that of the dense FFN on the same tokens, in the same round of the same "
    "process; median over rounds, in brackets its 10th and 90th percentile. Floor: the fewest "
    "FLOPs of any strategy over the dense FFN's. Peak: the most memory that one call held above "
    "what was allocated before it (temporaries, saved activations, results, gradients), measured. "
    "Error: relative L2 error against float64, of the result and the worst of the gradients; "
    "whatever is wrong has no times. Layers are timed with their routers."
)


class TextTable(NamedTuple):
    """A title, columns with their cells, and notes below (contenders that were not timed, with the
    reason)."""

    title: str
    columns: Mapping[str, Sequence[str]]
    notes: Sequence[str] = ()


def ratio_text(timing: Facts | None) -> str:
    """``1.23 (1.20-1.31)``: median of x dense with its 10th and 90th percentiles; one round has no
    spread."""
    if timing is None:
        return "-"
    digits = 0
    if timing["x"] < 10:
        digits = 2
    elif timing["x"] < 100:
        digits = 1
    x, low, high = (f"{timing[name]:.{digits}f}" for name in ("x", "low", "high"))
    return x if timing["rounds"] < 2 else f"{x} ({low}-{high})"


def number_text(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _floor(row: Facts, phase: str) -> str:
    return number_text(row.get("floor", {}).get(phase), ".2f")


def _peak(row: Facts, phase: str) -> str:
    memory = row.get("memory", {}).get(phase)
    if memory is None:
        return "-"
    mebibytes = memory["peak"] / 2**20
    return number_text(mebibytes, ".0f" if mebibytes >= 100 else ".3g")


def _error(row: Facts, phase: str) -> str:
    """The largest error of the result (``forward``) or of the gradients (``train``)."""
    errors = dict(row.get("errors", {}))
    error = errors.pop("y", None)
    if phase == "train":
        error = max(errors.values(), default=None)
    return number_text(error, ".0e")


def timing_table(section: Facts) -> TextTable:
    """A section's contenders: x baseline forward and forward + backward, floor, memory, error."""
    rows = []
    notes = defaultdict(list)
    for row in section["rows"]:
        if row.get("reason"):
            notes[row["reason"]].append(row["name"])
        else:
            rows.append(row)
    names = {"forward": "forward", "train": "fwd+bwd", "graph": "graph"}
    if section["key"] == "train_step":
        names["train"] = "step"
    if section["key"] == "generate":
        names["forward"] = "call"
    timed = [phase for phase in names if any(phase in row for row in rows)]
    phases = [phase for phase in timed if phase != "graph"]
    base = "dense" if section["baseline"] == "dense FFN" else section["baseline"]

    def pairs(cell: Callable[[Facts, str], str]) -> list[str]:
        return [" / ".join(cell(row, phase) for phase in phases) for row in rows]

    columns = {"contender": [row["name"] for row in rows]}
    for phase in timed:
        columns[f"{names[phase]} x {base}"] = [ratio_text(row.get(phase)) for row in rows]
    if any(row.get("floor") for row in rows):
        columns["floor"] = pairs(_floor)
    columns["peak MiB"] = pairs(_peak)
    speeds = [row.get("forward", {}).get("tokens_per_second") for row in rows]
    columns["tokens/s"] = [number_text(speed, ",.0f") for speed in speeds]
    columns["params M"] = [f"{row['parameters'] / 1e6:.2f}" for row in rows]
    columns["error"] = pairs(_error)
    lines = [f"{', '.join(who)}: {reason}" for reason, who in notes.items()]
    return TextTable(section["title"], columns, lines)


def planner_table(section: Facts) -> TextTable:
    """The choice against the best of another timing, misses first."""
    rows = sorted(section["rows"], key=lambda row: -row["ratio"])
    ratios = [row["ratio"] for row in rows]
    firsts = [sum(row["first_use"].values()) for row in rows]
    title = section["title"]
    if rows:
        within = sum(ratio <= TOLERANCE for ratio in ratios)
        title += (
            f": {within} of {len(rows)} within {TOLERANCE}, mean {mean(ratios):.3f}, "
            f"worst {max(ratios):.2f}; first use: median {median(firsts):.2f} s, "
            f"worst {max(firsts):.2f} s"
        )
    columns = {
        "case": [row["name"] for row in rows],
        "x best": [f"{ratio:.2f}" for ratio in ratios],
        "chosen (forward, backward)": [", ".join(row["chosen"].values()) for row in rows],
        "best measured": [", ".join(row["best"].values()) for row in rows],
    }
    return TextTable(title, columns)


def target_table(lines: Sequence[Facts]) -> TextTable:
    """Targets and whether they were reached."""
    columns = {}
    for name in ("what", "backend", "wanted"):
        columns[name] = [line[name] for line in lines]
    for dtype in ("float32", "bfloat16"):
        columns[dtype] = [
            line["found"].get(dtype, line["found"].get("both", "-")) for line in lines
        ]
    reached = [line["reached"] for line in lines]
    columns["reached"] = ["yes" if holds else "NO" for holds in reached]
    return TextTable(f"targets: {sum(reached)} of {len(reached)} reached", columns)


def table_of(section: Facts) -> TextTable:
    """The table of any section."""
    return (planner_table if section["key"] == "planner" else timing_table)(section)


def tables_of(sections: Sequence[Facts], targets: Sequence[Facts]) -> Iterator[TextTable]:
    """Of all that was measured, and the targets."""
    yield from map(table_of, sections)
    if targets:
        yield target_table(targets)


def machine_table(machine: Facts) -> TextTable:
    """The machine that was measured."""
    facts = {**machine, "backends": ", ".join(machine["backends"]), **machine["libraries"]}
    del facts["libraries"]
    known = {name: str(fact) for name, fact in facts.items() if fact}
    return TextTable("machine", {"": list(known), "value": list(known.values())})


def text_of(table: TextTable) -> str:
    """A table in Markdown, in aligned columns."""
    shown = []
    for number, (name, cells) in enumerate(table.columns.items()):
        size = max(map(len, ("--:", name, *cells)))
        rule = f"{'':-<{size - 1}}{':' if number else '-'}"
        shown.append([f"{cell:{'>' if number else '<'}{size}}" for cell in (name, rule, *cells)])
    lines = [f"| {' | '.join(row)} |" for row in zip(*shown, strict=True)]
    notes = ["", *(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n".join([f"### {table.title}", "", *lines, *notes, ""])


def markdown_report(results: Facts) -> str:
    """All tables of a run, as `mpoe_bench.run.run_suite` returned it."""
    lines = [f"# mpoe bench --suite {results['suite']}\n\n{HOW_TO_READ}\n"]
    if results["skipped"]:
        lines.append(f"The time did not suffice for: {'; '.join(results['skipped'])}.\n")
    lines += map(text_of, tables_of(results["sections"], results["targets"]))
    return "\n".join([*lines, text_of(machine_table(results["machine"]))])
