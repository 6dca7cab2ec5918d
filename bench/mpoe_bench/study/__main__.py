"""`python -m mpoe_bench.study STUDY.toml`: make the runs that are missing, one after another, and
write the table."""

import argparse
import fcntl
import json
import sys
from pathlib import Path

import torch

from mpoe.models.weight_files import write_text
from mpoe_bench.study.arms import ArmsStudy
from mpoe_bench.study.plan import Record, values_of
from mpoe_bench.study.quiet import QuietStudy

Runner = ArmsStudy | QuietStudy


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m mpoe_bench.study", description=__doc__)
    p.add_argument(
        "study", type=Path, help="its file; results stand beside it as .json, the table as .md"
    )
    p.add_argument(
        "--data_dir",
        type=Path,
        help="folder with austen, sms_spam, movie_sentiment, word_in_context",
    )
    p.add_argument("--model", type=Path, help="of quiet experts: folder of SmolLM2-135M-Instruct")
    p.add_argument("--work_dir", type=Path, help="of quiet experts: folder that keeps their files")
    p.add_argument("--run", help="only this run, by its key, of those that --table names")
    p.add_argument(
        "--table", action="store_true", help="run nothing; write the table and name what is missing"
    )
    return p


def open_study(file: Path) -> Runner:
    """A study by its file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has neither arms nor a success of quiet experts; see also `read_study`.
    """
    values = values_of(file)
    if "arms" in values:
        return ArmsStudy(file)
    if "success" in values:
        return QuietStudy(file)
    raise ValueError(
        f"{file} must have arms, or the success of quiet experts; it has {', '.join(values)}"
    )


def records_in(file: Path) -> dict[str, Record]:
    """Finished runs by key."""
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else {}


def store(study_file: Path, runner: Runner, made: dict[str, Record]) -> None:
    """Add records to the study's JSON and rewrite the table; two processes wait for each other."""
    file = study_file.with_suffix(".json")
    with study_file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = records_in(file)
        for key, record in made.items():
            records.setdefault(key, record)  # of a run that two processes made, the first record
        if made:
            write_text(
                file, json.dumps({"study": study_file.name, "runs": records}, indent=1) + "\n"
            )
        write_text(study_file.with_suffix(".md"), runner.table(records))
        if isinstance(runner, QuietStudy):
            runner.draw(records, study_file.with_suffix(".svg"))


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    torch.set_num_threads(1)
    file = arguments.study
    results = file.with_suffix(".json")
    try:
        runner = open_study(file)
        if arguments.table:
            store(file, runner, {})
            print("\n".join(runner.waiting(records_in(results))))
            return 0
        runner.prepare(arguments)
        while (
            waiting := runner.waiting(records := records_in(results))
        ) and arguments.run not in records:
            key = arguments.run or waiting[0]
            if key not in waiting:
                raise ValueError(f"run must be one that waits, as {waiting[0]!r}; got {key!r}")
            record = runner.make(key, records)
            store(file, runner, {key: record})
            numbers = {n: value for n, value in record.items() if isinstance(value, float | int)}
            print(f"{key}: {numbers}", flush=True)
        return 0
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
