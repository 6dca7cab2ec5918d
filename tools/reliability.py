"""Tries to break runs, checkpoints and inputs at length: what docs/reliability.md tells, of which CI tests a slice.

    python tools/reliability.py [PART=NUMBER ...]

By default kills=50 races=200 disks=6 calls=2000 inputs=2000 steps=1000.

A line per part: what was tried, what came of it, how many problems. Exit status 1 if anything is lost, is wrong or
fails with an internal error; SEED=1 in the environment changes what is random.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
DEFAULT = {"kills": 50, "races": 200, "disks": 6, "calls": 2000, "inputs": 2000, "steps": 1000}
SEED = int(os.environ.get("SEED", "0"))


def report(what: str, problems: list[str]) -> int:
    print(f"{what}; {len(problems)} problems", *problems, sep="\n    ", flush=True)
    return len(problems)


def run(part: str, number: int, folder: Path) -> int:
    """Try one part; returns how many problems there were."""
    from tests.faults import bad_calls, disks, kills, memory, races, run_fuzz

    if part == "kills":
        killed = kills.kill_runs(number, SEED, folder)
        found = f"{killed.kills} processes killed, {killed.while_saving} while saving"
        return report(f"{found}: {killed.runs} runs resumed to the weights of an undisturbed one", killed.problems)
    if part == "races":
        raced = races.race(number, SEED, folder)
        found = f"{raced.races} races for a folder: of {raced.processes} processes {raced.entered} were in"
        return report(f"{found}, {raced.told} were told who is", raced.problems)
    if part == "disks":
        expected = disks.straight_run(folder)
        room = (folder / "straight" / "model.safetensors").stat().st_size
        sizes = [1 + step * (2 * room - 2) // max(1, number - 1) for step in range(number)]
        problems = [problem for size in sizes for problem in disks.full_disk(folder, size, expected)]
        return report(f"{number} runs on a disk that fills up end in an OSError, then resume", problems)
    if part == "calls":
        called = bad_calls.run_calls(number, SEED, folder)
        names, refused = called.worked + called.refused, called.refused.total()
        raw = sum(count for name, count in names.items() if name.startswith("torch.ops"))
        found = f"{number} bad calls, {raw} of them of raw ops and {names[bad_calls.LIFE]} lives of layers"
        return report(f"{found}: {refused} refused clearly, {called.worked.total()} worked", called.problems)
    if part == "inputs":
        count = 0
        for kind in run_fuzz.KINDS:
            own = folder / kind.replace(" ", "_")
            own.mkdir()
            tried = run_fuzz.run_kind(kind, -(-number // len(run_fuzz.KINDS)), SEED, own)
            found = f"{tried.inputs} random {kind}: {tried.worked} worked, {tried.refused} refused clearly"
            count += report(found, tried.problems)
        return count
    grown = memory.growth(number, warm=number // 5)
    slope = f"memory grows by {grown.bytes_per_step:+.0f} bytes per step, {grown.new_tensors:+d} tensors"
    grows = grown.bytes_per_step > 2_000_000 / number or grown.new_tensors > 0  # two megabytes: allocator noise
    return report(f"{number} steps in one process, {grown.resident / 2**20:.0f} MiB resident", [slope] * grows)


def main(words: list[str]) -> int:
    asked = dict(word.partition("=")[::2] for word in words) or DEFAULT
    if not set(asked) <= set(DEFAULT):
        raise SystemExit(__doc__)
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)  # before anything computes: a process with a thread pool cannot be forked
    logging.set_verbosity_error()
    problems = 0
    for part, number in asked.items():
        with tempfile.TemporaryDirectory() as folder:
            problems += run(part, int(number) if number else DEFAULT[part], Path(folder))
    return min(1, problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
