"""Tries to break training runs, checkpoints and inputs, and counts what happens; ``--doc`` writes docs/reliability.md.

    python tools/reliability.py --kills 50 --races 200 --calls 2000 --inputs 2000 --steps 1000 --seed 0 --doc

Every number comes from this run: processes killed while they train and save, several processes competing for one
folder, full disks, damaged checkpoints, random inputs, bad calls of the public names, resident memory over a long
training run. Exit status 1 if anything is lost, is wrong or fails with an internal error.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from documents import write_between

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
DOC = ROOT / "docs" / "reliability.md"
Row = tuple[str, str, list[str]]  # what was tried, the result, problems


def kill(kills: int, seed: int, folder: Path) -> list[Row]:
    from tests.faults.kills import kill_runs

    tally = kill_runs(kills, seed, folder, say)
    found = f"{tally.runs} runs resumed to the weights of an undisturbed one, bit for bit"
    lengths = sorted(set(tally.resumed_from))
    what = f"{tally.kills} processes killed (SIGKILL), {tally.while_saving} of them while saving"
    return [(what, f"{found}; started from steps {', '.join(map(str, lengths))}", tally.problems)]


def start_together(races: int, seed: int, folder: Path) -> list[Row]:
    from tests.faults.races import race

    tally = race(races, seed, folder, say)
    what = f"{tally.races} races for a folder: double starts, and starts beside a run that is going"
    found = (
        f"of {tally.processes} processes {tally.entered} were in, never two at once, and {tally.told} were told who is"
    )
    return [(what, found, tally.problems)]


def fill_disks(folder: Path) -> list[Row]:
    from tests.faults.disks import full_disk, straight_run

    expected = straight_run(folder)
    room = (folder / "straight" / "model.safetensors").stat().st_size
    sizes = [1, 2_000, room // 2, room + 1_000, room * 3 // 2, room * 2 - 1]
    problems = [problem for size in sizes for problem in full_disk(folder, size, expected)]
    return [
        (f"{len(sizes)} runs on a disk that fills up at some point", "each ends in an OSError, then resumes", problems)
    ]


def damage(folder: Path) -> list[Row]:
    from mpoe import load_mpoe
    from tests.faults.damage import DAMAGES
    from tests.training.tiny import mpoe_model

    mpoe_model("t5").save_pretrained(folder / "model")
    problems = []
    for number, each in enumerate(DAMAGES):
        own = folder / f"{number}" / "model"
        shutil.copytree(folder / "model", own)
        each.spoil(own)
        try:
            load_mpoe(own)
            problems.append(f"{each.name}: loaded")
        except ValueError as error:
            say(f"{each.name}: {str(error)[:100]}")
        except Exception as error:
            problems.append(f"{each.name}: {type(error).__name__}: {error}")
    return [(f"{len(DAMAGES)} kinds of damaged or malicious checkpoints", "each refused by name", problems)]


def fuzz(inputs: int, seed: int, folder: Path) -> list[Row]:
    from tests.faults.run_fuzz import KINDS, run_kind

    rows: list[Row] = []
    for kind in KINDS:
        own = folder / kind.replace(" ", "_")
        own.mkdir()
        outcome = run_kind(kind, -(-inputs // len(KINDS)), seed, own)
        what = f"{outcome.inputs} random {kind}"
        rows.append((what, f"{outcome.worked} worked, {outcome.refused} refused clearly", outcome.problems))
        say(f"{what}: {rows[-1][1]}, {len(outcome.problems)} problems")
    return rows


def call_badly(calls: int, seed: int, folder: Path) -> list[Row]:
    from tests.faults.bad_calls import LIFE, run_calls

    outcome = run_calls(calls, seed, folder, say)
    names = outcome.worked + outcome.refused
    raw = sum(count for name, count in names.items() if name.startswith("torch.ops"))
    what = f"{calls} bad calls in processes of their own, {raw} of them of raw ops, {names[LIFE]} lives of layers"
    found = f"{outcome.refused.total()} refused clearly, {outcome.worked.total()} worked"
    return [(what, found, outcome.problems)]


def train_long(steps: int) -> list[Row]:
    from tests.faults.memory import growth

    found = growth(steps, warm=steps // 5)
    limit = 2_000_000 / steps  # two megabytes over the run: allocator noise
    slope = f"{found.bytes_per_step:+.0f} bytes per step after the first {steps // 5}, {found.new_tensors:+d} tensors"
    problems = [f"memory grows by {slope}"] if found.bytes_per_step > limit or found.new_tensors else []
    return [(f"{steps} training steps in one process", f"{found.resident / 2**20:.0f} MiB resident, {slope}", problems)]


def say(text: str) -> None:
    print(text, flush=True)


def table(rows: list[Row]) -> str:
    lines = ["| tried | result | problems |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {found} | {len(problems)} |" for what, found, problems in rows)])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="processes to kill")
    parser.add_argument("--races", type=int, default=200, help="folders that several processes compete for")
    parser.add_argument("--calls", type=int, default=2000, help="bad calls of the public names")
    parser.add_argument("--inputs", type=int, default=2000, help="random inputs, the same number of each kind")
    parser.add_argument("--steps", type=int, default=1000, help="training steps over which memory is watched")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "--only", default="", help="parts, comma-separated: kills, races, disks, damage, inputs, calls, memory"
    )
    parser.add_argument("--doc", action="store_true", help="write the table into docs/reliability.md")
    chosen = parser.parse_args(words)
    warnings.simplefilter("ignore")
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)  # before anything computes: a process with a thread pool cannot be forked
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parts: dict[str, Callable[[Path], list[Row]]] = {
        "kills": lambda folder: kill(chosen.kills, chosen.seed, folder),
        "races": lambda folder: start_together(chosen.races, chosen.seed, folder),
        "disks": fill_disks,
        "damage": damage,
        "inputs": lambda folder: fuzz(chosen.inputs, chosen.seed, folder),
        "calls": lambda folder: call_badly(chosen.calls, chosen.seed, folder),
        "memory": lambda folder: train_long(chosen.steps),
    }
    problems: list[str] = []
    for part in chosen.only.split(",") if chosen.only else parts:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows = parts[part](Path(folder))
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, torch {torch.__version__}"
        when = f"{datetime.date.today().isoformat()}, {machine}, seed {chosen.seed}"
        text = f"{table(rows)}\n\n{when}, {time.monotonic() - start:.0f} s."
        say(text)
        if chosen.doc:
            write_between(DOC, part, text)
        problems += [problem for *_, found in rows for problem in found]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
