"""`python -m mpoe_bench.study STUDY.toml`: make the runs that are missing, one after another, and write the table."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from mpoe_bench.study.composed import ComposedStudy
from mpoe_bench.study.plan import values_of
from mpoe_bench.study.training import ArmsStudy

Runner = ArmsStudy | ComposedStudy


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m mpoe_bench.study", description=__doc__)
    p.add_argument("study", type=Path, help="its file; results stand beside it as .json, the table as .md")
    p.add_argument("--data_dir", type=Path, help="folder with austen, sms_spam, movie_sentiment, word_in_context")
    p.add_argument("--model", type=Path, help="of experts that are composed: folder of SmolLM2-135M-Instruct")
    p.add_argument("--work_dir", type=Path, help="of experts that are composed: folder that keeps their files")
    p.add_argument("--run", help="only this run, by its key, of those that --table names")
    p.add_argument("--table", action="store_true", help="run nothing; write the table and name what is missing")
    return p


def open_study(file: Path) -> Runner:
    """A study by its file.

    Raises:
        FileNotFoundError, ValueError: see `read_study`.
    """
    return (ArmsStudy if "arms" in values_of(file) else ComposedStudy)(file)


def records_in(file: Path) -> dict[str, Any]:
    """Finished runs by key."""
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else {}


def write_text(file: Path, text: str) -> None:
    """Write a file completely or not at all."""
    scratch = file.with_name(f"{file.name}.{os.getpid()}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)


def store(study_file: Path, key: str, record: dict[str, Any], runner: Runner) -> None:
    """Add a record to the study's JSON and rewrite the table; two processes wait for each other."""
    file = study_file.with_suffix(".json")
    with study_file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = records_in(file)
        records.setdefault(key, record)
        write_text(file, json.dumps({"study": study_file.name, "runs": records}, indent=1) + "\n")
        write_text(study_file.with_suffix(".md"), runner.table(records))


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    torch.set_num_threads(1)
    file: Path = arguments.study
    results = file.with_suffix(".json")
    try:
        runner = open_study(file)
        if arguments.table:
            records = records_in(results)
            write_text(file.with_suffix(".md"), runner.table(records))
            print("\n".join(runner.waiting(records)))
            return 0
        runner.prepare(arguments)
        while True:
            records = records_in(results)
            waiting = runner.waiting(records)
            if not waiting or arguments.run in records:
                return 0
            key = arguments.run or waiting[0]
            if key not in waiting:
                raise ValueError(f"run must be one that waits, as {waiting[0]!r}; got {key!r}")
            record = runner.make(key, records)
            store(file, key, record, runner)
            told = {name: value for name, value in record.items() if isinstance(value, float | int)}
            print(f"{key}: {told}", flush=True)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
