"""`mpoe bench`: measure mixtures and their peers on this machine, and write tables and JSON."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoe.cli.command import Request, as_command, option
from mpoe.cli.errors import CommandError
from mpoe.cli.outputs import RESULTS_FILE, check_output, write_json
from mpoe.models.weight_files import write_text

REPORT_FILE = "report.md"
INCOMPLETE_FILE = "incomplete.json"


@dataclass
class BenchOptions:
    """What to measure, and how."""

    suite: str = option("quick", "quick (minutes), planner (its cases), targets, layers, models")
    device: str = option("cpu", "cpu or cuda")
    backend: str | None = option(None, "auto, all, or names with commas; default: auto and eager")
    out: Path = option(Path("bench_results"), "folder for report.md and results.json")
    threads: int | None = option(None, "torch threads; default: every usable processor")
    scale: str = option("real", "real, or tiny: everything once on sizes of a test, in seconds")
    overwrite: bool = option(False, "replace the results in the output folder")
    minutes: float | None = option(None, "begin nothing new after so long")
    only: str = option("", "only contenders whose name contains one of these words, with commas")
    phases: str = option(
        "forward,train,graph", "what is timed of each; graph: as a CUDA graph, on a GPU"
    )

    LEAST = (("minutes", 0),)


@as_command(BenchOptions)
def command(request: Request) -> dict:
    """Measure as the options say; returns what ``results.json`` holds."""
    (options,) = request.options
    check_output("out", options.out, options.overwrite, "earlier results", [RESULTS_FILE])
    try:
        results = _measure(options)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("mpoe_bench", "pytest_benchmark"):
            raise
        how = 'in a checkout: pip install -e ".[bench]", or its folder bench on PYTHONPATH'
        raise CommandError(
            f"the benchmarks are not installed: no package {error.name} ({how})"
        ) from None
    except ValueError as error:
        raise CommandError(str(error)) from None
    if results["failures"]:
        raise CommandError(f"wrong or failed: {'; '.join(results['failures'])}")
    return results


def _measure(options: BenchOptions) -> dict:
    import pytest_benchmark  # noqa: F401 - an extra, see pyproject.toml
    from mpoe_bench.run import run_suite
    from mpoe_bench.tables import (
        HOW_TO_READ,
        machine_table,
        markdown_report,
        table_of,
        target_table,
        text_of,
    )

    suite = options.suite
    out = options.out
    terminal = sys.stdout
    sections: list[dict] = []

    def show(table: Any) -> None:
        print(text_of(table), file=terminal, flush=True)

    def finished(section: dict) -> None:
        sections.append(section)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / INCOMPLETE_FILE, {"suite": suite, "sections": sections})
        show(table_of(section))

    print(f"Suite {suite}. {HOW_TO_READ}", flush=True)
    names = ("device", "threads", "scale", "backend", "minutes", "only")
    chosen = {name: getattr(options, name) for name in names}
    phases = tuple(word.strip() for word in options.phases.split(","))
    try:
        results = run_suite(suite, **chosen, phases=phases, on_section=finished)
    except BaseException:
        if sections:
            print(f"unfinished; the sections so far are in {out / INCOMPLETE_FILE}")
        raise
    out.mkdir(parents=True, exist_ok=True)
    (out / INCOMPLETE_FILE).unlink(missing_ok=True)
    if results["skipped"]:
        print(f"the time did not suffice for: {'; '.join(results['skipped'])}")
    if results["targets"]:
        show(target_table(results["targets"]))
    show(machine_table(results["machine"]))
    write_json(out / RESULTS_FILE, results)
    write_text(out / REPORT_FILE, markdown_report(results))
    print(f"{results['seconds']:.0f} s; {out / REPORT_FILE}, {out / RESULTS_FILE}")
    return results
