"""`python -m mpoe_bench.quality`: run a plan, or continue it, and write its report."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from mpoe_bench.quality.language import LanguageField
from mpoe_bench.quality.novels import NovelsField
from mpoe_bench.quality.plans import PLANS, Plan
from mpoe_bench.quality.report import write_report
from mpoe_bench.quality.runs import run_plan
from mpoe_bench.quality.sentences import SentencesField
from mpoe_bench.quality.spans import SpansField

FIELDS = {field.name: field for field in (SentencesField, LanguageField, SpansField, NovelsField)}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m mpoe_bench.quality", description=__doc__)
    p.add_argument("plan", choices=tuple(PLANS), help="short: MiniLM, four arms, half an hour on two cores")
    p.add_argument("--data_dir", type=Path, required=True, help="folder with austen, sms_spam, movie_sentiment, ...")
    p.add_argument("--out", type=Path, required=True, help="finished runs in it are kept, missing runs are made")
    p.add_argument("--arms", help="keys separated by commas; default: the plan's")
    p.add_argument("--seeds", help="numbers separated by commas; default: the plan's")
    p.add_argument("--steps", type=int, help="steps of every run, instead of the plan's")
    p.add_argument("--threads", type=int, default=1, help="torch threads; default 1")
    p.add_argument("--report_only", action="store_true", help="run nothing, only report finished runs")
    return p


def chosen_plan(arguments: argparse.Namespace) -> Plan:
    """The plan with the command line's changes."""
    changes: dict[str, Any] = {}
    if arguments.arms:
        changes["arms"] = tuple(arguments.arms.split(","))
    if arguments.seeds:
        changes["seeds"] = tuple(int(seed) for seed in arguments.seeds.split(","))
    if arguments.steps is not None:
        if arguments.steps < 1:
            raise ValueError(f"steps must be at least 1; got {arguments.steps}")
        changes["steps"] = arguments.steps
    return dataclasses.replace(PLANS[arguments.plan], **changes)


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        plan = chosen_plan(arguments)
        field = FIELDS[plan.field](arguments.data_dir, **plan.settings)
        if not arguments.report_only:
            run_plan(plan, field, arguments.out, lambda line: print(line, flush=True))
        print(write_report(arguments.out, field))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
