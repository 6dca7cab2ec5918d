"""`python -m mpoe_bench.study STUDY.toml`: make the runs that are missing, one after another, and write the table."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mpoe_bench.study.language import read_blocks
from mpoe_bench.study.plan import Run, Study, read_study
from mpoe_bench.study.table import Records, runs_of, study_table
from mpoe_bench.study.training import Trained, run_once


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m mpoe_bench.study", description=__doc__)
    p.add_argument("study", type=Path, help="its file; results stand beside it as .json, the table as .md")
    p.add_argument("--data_dir", type=Path, help="folder with austen, sms_spam, movie_sentiment, word_in_context")
    p.add_argument("--run", help="only this run, as in the JSON: 'MODEL/STEPS ARM RATE SEED'")
    p.add_argument("--table", action="store_true", help="run nothing; write the table and name what is missing")
    return p


def waiting(study: Study, records: Records) -> Iterator[Run]:
    """Runs that are missing and whose rate is known, in their order: of a stage first those that choose rates."""
    for stage in study.stages:
        for arm in stage.arms:
            yield from (run for run in study.candidates(stage.model, arm) if run.key not in records)
        for seed in study.seeds:
            for arm in stage.arms:
                runs = runs_of(study, stage.corner, arm, records)
                yield from (run for run in runs if run.seed == seed and run.key not in records)


def named_run(study: Study, key: str) -> Run:
    """The run with this key.

    Raises:
        ValueError: the study has none.
    """
    seeds, every = study.seeds, []
    for corner, arms in study.corners().items():
        for arm in arms:
            every += study.candidates(corner.model, arm)
            every += [Run(corner, arm, rate, seed) for rate in study.rates[corner.model] for seed in seeds]
    for run in every:
        if run.key == key:
            return run
    raise ValueError(f"run must be one of the study's, as {every[0].key!r}; got {key!r}")


def records_in(file: Path) -> dict[str, Any]:
    """Finished runs by key."""
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else {}


def write_text(file: Path, text: str) -> None:
    """Write a file completely or not at all."""
    scratch = file.with_name(f"{file.name}.{os.getpid()}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)


def store(study_file: Path, key: str, record: dict[str, Any], table: Callable[[Records], str]) -> None:
    """Add a record to the study's JSON and rewrite the table; two processes wait for each other."""
    file = study_file.with_suffix(".json")
    with study_file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = records_in(file)
        records.setdefault(key, record)
        write_text(file, json.dumps({"study": study_file.name, "runs": records}, indent=1) + "\n")
        write_text(study_file.with_suffix(".md"), table(records))


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    torch.set_num_threads(1)
    file: Path = arguments.study
    results = file.with_suffix(".json")
    try:
        study = read_study(file)
        asked = None if arguments.run is None else named_run(study, arguments.run)
        if arguments.table:
            records = records_in(results)
            write_text(file.with_suffix(".md"), study_table(study, records))
            print("\n".join(run.key for run in waiting(study, records)))
            return 0
        if arguments.data_dir is None:
            raise ValueError("data_dir must name the folder of the texts; got none")
        data = read_blocks(arguments.data_dir)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    starts: dict[tuple[Any, ...], Trained] = {}
    while True:
        records = records_in(results)
        run = asked or next(waiting(study, records), None)
        if run is None or run.key in records:
            return 0
        record = run_once(study, run, data, starts)
        store(file, run.key, record, partial(study_table, study))
        print(f"{run.key}: validation {record['validation']:.4f}, {record.get('cpu_seconds', 0):.0f} CPU s", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
