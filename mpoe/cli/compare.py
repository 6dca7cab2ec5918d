"""`mpoe compare RUN_DIR RUN_DIR ...`: training runs side by side, on the terminal and as a report.

It shows parameters, the settings that differ, scores, curves and time. Unfinished runs are shown as far as they got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpoe.cli.errors import CommandError
from mpoe.cli.files import REPORT_FILE, write_json
from mpoe.cli.parsing import option, read_command
from mpoe.cli.run_folder import read_run

MOST_RUNS = 12
NUMBERS_FILE = "compare.json"


@dataclass
class CompareOptions:
    """Options that only `compare` has."""

    _argument_group_name = "comparison"

    output_dir: str = option("mpoe_compare", "folder for report.html and compare.json")
    overwrite: bool = option(False, "replace the report in the output folder")
    names: list[str] = option([], "what the runs are called, in their order; default: their folders' names")


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    usage = "mpoe compare RUN_DIR RUN_DIR ... [--flag value ...]"
    asked = read_command(usage, __doc__, [CompareOptions], arguments, words=MOST_RUNS)
    if asked is None:
        return
    (options,) = asked.options
    run(asked.words, options)


def run(paths: Sequence[str], options: CompareOptions) -> None:
    """Compare the runs in folders ``paths``; prints tables and writes the report."""
    if len(paths) < 2:
        raise CommandError(f"compare needs two runs or more; got {len(paths)}: mpoe compare RUN_DIR RUN_DIR ...")
    folder = _checked_folder(options)
    runs = [read_run(path, name) for path, name in zip(paths, _names(paths, options.names), strict=True)]
    from mpoe.cli.compare_report import show, write_comparison
    from mpoe.cli.comparison import compare

    tables = compare(runs)
    show(tables)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NUMBERS_FILE, [vars(run) for run in runs])
    write_comparison(folder / REPORT_FILE, runs, tables)
    print(f"report and numbers are in {folder}; open {folder / REPORT_FILE}")


def _checked_folder(options: CompareOptions) -> Path:
    from mpoe.training.output_dir import RUN_FILE, check_folder

    folder = check_folder("output_dir", Path(options.output_dir))
    if (folder / "config.json").exists() or (folder / RUN_FILE).exists():
        raise CommandError(f"output_dir {folder} holds a model or a run; choose another folder")
    if (folder / REPORT_FILE).exists() and not options.overwrite:
        raise CommandError(f"output_dir {folder} holds an earlier report; give --overwrite, or another --output_dir")
    return folder


def _names(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """Unique names of the runs: the given ones, the folders' names, or the whole paths."""
    if names and len(names) != len(paths):
        raise CommandError(f"names must be one for each of the {len(paths)} runs; got {len(names)}")
    own = list(names) or [Path(path).resolve().name for path in paths]
    return own if len(set(own)) == len(own) else [f"{k} {name}" for k, name in enumerate(own, start=1)]
