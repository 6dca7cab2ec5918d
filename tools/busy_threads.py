"""How much training slows down when another program keeps a core busy, with one thread and with two.

    python tools/busy_threads.py --steps 20 --rounds 3

Trains the same small T5 in turns: our mixture on the eager and on the native backend, and the dense model in plain
PyTorch. Each runs with one and with two threads; alone and with a process that computes without pause on the first of
the run's cores; and with OpenMP threads that spin while they wait (the default) or sleep (`OMP_WAIT_POLICY=passive`).
Every run is a separate process, pinned to the same two cores.

Prints steps per second (medians), the slowdown caused by the busy core, and CPU seconds per step, because spinning
threads use CPU time without computing anything. The machine's load is printed too: "alone" is only as true as that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTENDERS = ("plain torch", "eager", "native")
POLICIES = ("default", "passive")
Cell = tuple[str, int, bool, str]  # contender, threads, whether a core is busy, waiting policy


def train(contender: str, threads: int, steps: int) -> dict[str, float]:
    """Train in this process; returns wall seconds and CPU seconds per step."""
    sys.path.insert(0, str(ROOT))
    import torch

    from mpoe import MPOEConfig, convert_to_mpoe
    from mpoe.data.embedded import load_stand_in
    from tests.training.tiny import Rows

    torch.set_num_threads(threads)
    model, _ = load_stand_in("t5")
    if contender != "plain torch":
        model = convert_to_mpoe(model, MPOEConfig(num_experts=8, shape="separable", backend=contender))
    rows = Rows("t5", rows=32).rows
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    model.train()
    wall = used = 0.0
    for step in range(steps + 3):
        if step == 3:  # the first three are warm-up
            wall, used = time.perf_counter(), time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"wall": (time.perf_counter() - wall) / steps, "used": (time.process_time() - used) / steps}


def run(cell: Cell, steps: int, cores: list[int]) -> dict[str, float]:
    """One run in a separate process."""
    contender, threads, busy, policy = cell
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_WAIT_POLICY", None)
    if policy == "passive":
        environment["OMP_WAIT_POLICY"] = "passive"
    command = [sys.executable, __file__, "--steps", str(steps), "--one", contender, "--threads", str(threads)]
    other = None
    if busy:
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=lambda: _keep_on(cores[:1]))
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, preexec_fn=lambda: _keep_on(cores)
        )
    finally:
        if other is not None:
            other.kill()
            other.wait()
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _keep_on(cores: list[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def table(found: dict[Cell, list[dict[str, float]]]) -> str:
    lines = ["| run | threads | waiting | alone, steps/s | busy core | slower | processor s/step, alone | busy |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for contender, threads, policy in itertools.product(CONTENDERS, (1, 2), POLICIES):
        parts = [found.get((contender, threads, busy, policy)) for busy in (False, True)]
        if None in parts:
            continue
        alone, busy = ({k: statistics.median(run[k] for run in runs or ()) for k in ("wall", "used")} for runs in parts)
        lines.append(
            f"| {contender} | {threads} | {policy} | {1 / alone['wall']:.1f} | {1 / busy['wall']:.1f} |"
            f" {busy['wall'] / alone['wall']:.2f} x | {alone['used']:.3f} | {busy['used']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps per run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every kind, in turns")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(train(chosen.one, chosen.threads, chosen.steps)))
        return
    cores = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else [0, 1]
    cells = [
        (contender, threads, busy, policy)
        for contender, threads, busy, policy in itertools.product(CONTENDERS, (1, 2), (False, True), POLICIES)
        if threads > 1 or policy == "default"  # a single thread never waits
    ]
    found: dict[Cell, list[dict[str, float]]] = {cell: [] for cell in cells}
    for number in range(chosen.rounds):
        for cell in cells:
            found[cell].append(run(cell, chosen.steps, cores))
        print(f"round {number + 1} of {chosen.rounds}; load {os.getloadavg()[0]:.1f} on {len(cores)} cores", flush=True)
        print(table(found), flush=True)


if __name__ == "__main__":
    main()
