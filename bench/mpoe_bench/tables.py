"""Results as rows of text: the terminal and the report show the same cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpoe_bench.machine import title_of


@dataclass(frozen=True)
class TextTable:
    """A title, a header, rows, and notes below (contenders that were not timed, with the reason).

    ``spare`` names columns that are dropped on a narrow terminal, in this order.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    spare: Sequence[str] = ()

    def without(self, name: str) -> TextTable:
        """The same table without one column."""
        kept = [index for index, found in enumerate(self.header) if found != name]
        rows = [[row[index] for index in kept] for row in self.rows]
        return replace(self, header=[self.header[index] for index in kept], rows=rows)


def seconds_text(seconds: float | None) -> str:
    """``12.3 ms`` with three significant digits."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def mebibytes(count: float | None) -> str:
    """``12.3`` MiB."""
    if count is None:
        return "-"
    value = count / 2**20
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio_text(timing: Mapping[str, Any] | None) -> str:
    """``1.23 (1.20-1.31)``: median of x dense with its 10th and 90th percentiles; one round has no spread."""
    if timing is None or timing["x"] is None:
        return "-"
    digits = 2 if timing["x"] < 10 else 1 if timing["x"] < 100 else 0
    spread = "" if timing["rounds"] < 2 else f" ({timing['low']:.{digits}f}-{timing['high']:.{digits}f})"
    return f"{timing['x']:.{digits}f}{spread}"


def _floor(row: Mapping[str, Any], phase: str) -> str:
    value = (row.get("floor") or {}).get(phase)
    return "-" if value is None else f"{value:.2f}"


def _peak(row: Mapping[str, Any], phase: str) -> str:
    memory = (row.get("memory") or {}).get(phase)
    return mebibytes(None if memory is None else memory["peak"])


def _tokens(row: Mapping[str, Any]) -> str:
    rate = (row.get("forward") or {}).get("tokens_per_second")
    return "-" if rate is None else f"{rate:,.0f}"


def _error(row: Mapping[str, Any], phase: str | None = None) -> str:
    """The largest error of the result (``forward``), of the gradients (``train``), or of both."""
    wanted = {"forward": lambda name: name == "y", "train": lambda name: name != "y", None: lambda _: True}[phase]
    errors = [value for name, value in (row.get("errors") or {}).items() if wanted(name)]
    return f"{max(errors):.0e}" if errors else "-"


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per reason, with the names of all rows that share it."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.get("reason"):
            names.setdefault(row["reason"], []).append(row["name"])
    return [f"{', '.join(found)}: {reason}" for reason, found in names.items()]


def timing_table(section: Mapping[str, Any]) -> TextTable:
    """A section's contenders: x baseline forward and forward + backward, floor, memory, error."""
    rows = [row for row in section["rows"] if not row.get("reason")]
    phases = ("forward", "train") if any("train" in row for row in rows) else ("forward",)
    base = section["baseline"] if section["baseline"] != "dense FFN" else "dense"
    names = {"forward": "forward", "train": "step" if section["key"] == "train_step" else "fwd+bwd"}
    names["forward"] = "whole call" if section["key"] == "generate" else "forward"
    which = "fwd / both" if len(phases) > 1 else "forward"

    def pair(cell: Callable[[Mapping[str, Any], str], str], row: Mapping[str, Any]) -> str:
        """Both phases in one cell."""
        return " / ".join(cell(row, phase) for phase in phases)

    floors = any(row.get("floor") for row in rows)
    own_backends = {row["backend"] for row in rows if row.get("backend")}
    header = ["contender", *(f"{names[phase]}\nx {base}" for phase in phases)]
    header += [f"floor\n{which}"] if floors else []
    header += ["forward\ntime", "tokens/s\nforward", f"peak MiB\n{which}", "params\nM"]
    header += ["error\ny / gradients" if "train" in phases and section["key"] != "train_step" else "error\ny"]
    body = []
    for row in rows:
        suffix = f" [{row.get('backend')}]" if len(own_backends) == 1 else ""
        cells = [row["name"].removesuffix(suffix), *(ratio_text(row.get(phase)) for phase in phases)]
        cells += [pair(_floor, row)] if floors else []
        cells += [seconds_text((row.get("forward") or {}).get("seconds")), _tokens(row), pair(_peak, row)]
        cells += [f"{row['parameters'] / 1e6:.2f}" if row.get("parameters") else "-"]
        cells += [pair(_error, row) if "y / g" in header[-1] else _error(row)]
        body.append(cells)
    spare = [
        name for word in ("tokens/s", "params", "error", "forward\ntime", "peak") for name in header if word in name
    ]
    backend = f" [{own_backends.pop()}]" if len(own_backends) == 1 else ""
    return TextTable(section["title"] + backend, header, body, _notes(section["rows"]), spare)


def planner_table(section: Mapping[str, Any]) -> TextTable:
    """The choice against the best of another timing, misses first."""
    body = []
    for row in sorted(section["rows"], key=lambda row: -row["ratio"]):
        missed = " MISS" if row["ratio"] > section["tolerance"] else ""
        names = ("\n".join(row[which].values()) for which in ("chosen", "best"))
        body.append([row["name"], f"{row['ratio']:.2f}{missed}", *names, seconds_text(row["chosen_seconds"])])
    header = ["case", "x best", "chosen\n(forward, backward)", "best measured", "chosen took"]
    return TextTable(section["title"], header, body, (), header[-1:])


def target_table(lines: Sequence[Mapping[str, Any]]) -> TextTable:
    """Targets and whether they were reached."""
    verdicts = {True: "yes", False: "NO", None: "-"}
    backends = {line["backend"] for line in lines if line["backend"] != "-"}
    body = []
    for line in lines:
        found = [line["found"].get(dtype, line["found"].get("both", "-")) for dtype in ("float32", "bfloat16")]
        body.append([line["what"], line["backend"], line["wanted"], *found, verdicts[line["reached"]]])
    judged = [line for line in lines if line["reached"] is not None]
    title = f"targets: {sum(line['reached'] for line in judged)} of {len(judged)} reached"
    table = TextTable(title, ["what", "backend", "wanted", "float32", "bfloat16", "reached"], body)
    if len(backends) > 1:
        return table
    return replace(table.without("backend"), title=f"{title} [{backends.pop()}]" if backends else title)


def machine_table(machine: Mapping[str, Any]) -> TextTable:
    """The machine that was measured."""
    body = [
        ["machine", title_of(dict(machine))],
        ["cores usable", str(machine["cores"])],
        ["clock", {"wall": "wall time", "cpu": "CPU time of the process"}[machine["clock"]]],
        ["backends", f"{', '.join(machine['backends'])}; native kernels with {machine['native_isa'] or '-'}"],
        ["mpoe", f"{machine['mpoe']}{', commit ' + machine['revision'] if machine.get('revision') else ''}"],
        ["libraries", ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())],
        ["python, system", f"{machine['python']}, {machine['system']}"],
        ["date", machine["date"]],
    ]
    if machine["load_average"]:
        body.append(["load average at the start", ", ".join(f"{value:.2f}" for value in machine["load_average"])])
    return TextTable("machine", ["", "value"], body)


def table_of(section: Mapping[str, Any]) -> TextTable:
    """The table of any section."""
    if section["key"] == "planner":
        return planner_table(section)
    return timing_table(section)


HOW_TO_READ = (
    "x dense: time over that of the dense FFN on the same tokens, in the same round of the same process; median over "
    "rounds, in brackets its 10th and 90th percentile. Floor: the fewest FLOPs of any strategy over the dense FFN's. "
    "Peak: the most memory that one call held above what was allocated before it (temporaries, saved activations, "
    "results, gradients), measured. Error: relative L2 error against float64, of the result and the worst of the "
    "gradients; whatever is wrong has no times."
)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " / ")


def markdown_table(table: TextTable) -> str:
    """A table and its notes; the first column is left-aligned."""
    header = [_cell(name).replace(" / ", " ") for name in table.header]
    lines = [
        f"### {table.title}",
        "",
        f"| {' | '.join(header)} |",
        f"| {' | '.join(['---', *['---:'] * (len(header) - 1)])} |",
        *(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table.rows),
    ]
    if table.notes:
        lines += ["", "Not timed:", "", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def markdown_report(results: Mapping[str, Any]) -> str:
    """All tables of a run, as `mpoe_bench.run_suite` returned it."""
    head = f"# mpoe bench --suite {results['suite']}\n\n{HOW_TO_READ}\n"
    tables = [target_table(results["targets"])] if results["targets"] else []
    tables += [*map(table_of, results["sections"]), machine_table(results["machine"])]
    skipped = [f"The time did not suffice for: {'; '.join(results['skipped'])}.\n"] if results["skipped"] else []
    return "\n".join([head, *skipped, *map(markdown_table, tables)])
