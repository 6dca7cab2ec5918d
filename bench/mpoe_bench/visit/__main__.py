"""`bench/gpu.sh`: one visit to a GPU, with a budget in minutes, that continues where an earlier one stopped.

See `mpoe_bench.visit.parts` for what is done. All results are in one folder, and in one archive next to it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mpoe_bench.section import FOLDERS
from mpoe_bench.visit.parts import ROOT, Part, parts

RESERVE = 15.0  # seconds kept for the report
LEAST = 120.0  # seconds that a part which must finish may always take, however short its usual time
GRACE = 20.0  # seconds by which a part that ends by itself may exceed its minutes


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part.

    ``result`` is ``passed``, ``failed``, ``out of time``, ``skipped`` or ``not begun``; ``detail`` is the last line
    that the part printed, or why it did not run.
    """

    name: str
    what: str
    result: str
    seconds: float
    detail: str


def shares(todo: Sequence[Part], seconds: float) -> dict[str, float]:
    """Seconds for each part that can run.

    A part that is useless unless it finishes may take twice its usual time, and two minutes in any case; parts that
    end by themselves share the time that the others usually leave.
    """
    able = {part.name: part for part in todo if not part.missing}
    own = {name: 60 * part.minutes for name, part in able.items()}
    rest = max(0.0, seconds - sum(own[name] for name, part in able.items() if not part.knows_minutes))
    wanted = sum(own[name] for name, part in able.items() if part.knows_minutes)
    fraction = min(1.0, rest / wanted) if wanted else 0.0
    return {
        n: fraction * own[n] if part.knows_minutes else min(seconds, max(LEAST, 2 * own[n])) for n, part in able.items()
    }


def plan(todo: Sequence[Part], minutes: float) -> str:
    """What would be done, with the time that each part usually takes and the time that it gets."""
    given = shares(todo, 60 * minutes - RESERVE)
    lines = [f"{'part':<12}{'usual s':>12}{'given s':>9}  what"]
    for part in todo:
        known = given.get(part.name)
        times = f"{'-':>12}{'-':>9}" if known is None else f"{60 * part.minutes:12.0f}{known:9.0f}"
        lines.append(f"{part.name:<12}{times}  {part.what}{f' (not here: {part.missing})' if part.missing else ''}")
    return "\n".join(lines)


def run_part(part: Part, limit: float, out: Path) -> Outcome:
    """Run a process for at most ``limit`` seconds; its output goes into a log, without folder names."""
    if part.missing:
        return Outcome(part.name, part.what, "skipped", 0.0, part.missing)
    if limit < 1:
        return Outcome(part.name, part.what, "not begun", 0.0, "no time was left")
    command = list(part.command)
    if part.knows_minutes:
        command += ["--minutes", f"{limit / 60:.3f}"]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | dict(part.environment),
            timeout=limit + (GRACE if part.knows_minutes else 0),
        )
        text = done.stdout
        result = "passed" if done.returncode == 0 else "skipped" if done.returncode == part.unable else "failed"
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        text, result = partial.decode(errors="replace") if isinstance(partial, bytes) else partial, "out of time"
    text = FOLDERS.sub("", text)
    (out / f"{part.name}.log").write_text(text)
    lines = [line.strip(" =") for line in text.splitlines() if line.strip(" =")]
    return Outcome(part.name, part.what, result, time.monotonic() - began, lines[-1][:160] if lines else "")


def card_name(device: str) -> str:
    """``nvidia-h100-80gb-hbm3``; ``trial-on-cpu`` without a GPU."""
    if device == "cpu":
        return "trial-on-cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def report(outcomes: Sequence[Outcome], device: str) -> str:
    """The parts' outcomes as Markdown."""
    lines = [
        f"# {card_name(device)}, {datetime.date.today().isoformat()}\n",
        f"`bench/gpu.sh --device {device}`. The logs of the parts are in this folder; so are `host.jsonl` (host time)"
        " and [times](times/report.md), all cases beside their peers.\n",
        "| part | | result | s | last line |",
        "|---|---|---|---:|---|",
    ]
    for outcome in outcomes:
        detail = outcome.detail.replace("|", "\\|")
        lines.append(f"| {outcome.name} | {outcome.what} | {outcome.result} | {outcome.seconds:.0f} | {detail} |")
    return "\n".join(lines) + "\n"


def keep(outcomes: Sequence[Outcome], device: str, out: Path) -> None:
    """Write report, state and archive after every part: the machine may be taken away at any time."""
    (out / "report.md").write_text(report(outcomes, device))
    (out / "parts.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=2) + "\n")
    with tarfile.open(out.with_name(out.name + ".tar.gz"), "w:gz") as archive:
        archive.add(out, out.name)


def earlier(out: Path) -> dict[str, Outcome]:
    """The parts that an earlier visit to this folder finished."""
    if not (out / "parts.json").exists():
        return {}
    found = [Outcome(**each) for each in json.loads((out / "parts.json").read_text())]
    return {
        each.name: each for each in found if each.result == "passed" and not re.search(r" [1-9]\d* left", each.detail)
    }


def visit(device: str, minutes: float, out: Path) -> list[Outcome]:
    """Run the parts that are not done yet; if a judging part fails, the visit ends."""
    end = time.monotonic() + 60 * minutes - RESERVE
    before, todo = earlier(out), parts(device, out)
    outcomes: list[Outcome] = []
    stopped = ""
    for place, part in enumerate(todo):
        if part.name in before:
            outcomes.append(before[part.name])
            continue
        left = end - time.monotonic()
        given = shares([each for each in todo[place:] if each.name not in before], left)
        if stopped:
            outcome = Outcome(part.name, part.what, "not begun", 0.0, f"{stopped} failed")
        else:
            outcome = run_part(part, min(left, given.get(part.name, 0.0)), out)
        if part.judges and outcome.result in ("failed", "out of time"):
            stopped = stopped or part.name
        outcomes.append(outcome)
        print(f"{outcome.name:<12}{outcome.result:<12}{outcome.seconds:5.0f} s  {outcome.detail}", flush=True)
        keep([*outcomes, *(before[each.name] for each in todo[place + 1 :] if each.name in before)], device, out)
    return outcomes


def main(words: Sequence[str] | None = None) -> int:
    """Returns 1 if a part failed or a trial run left one out, 2 if there is no such device."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0, help="for this call, all parts together")
    parser.add_argument("--out", type=Path, help="default: bench/results/<card>-<date>; a visit in it is continued")
    parser.add_argument("--plan", action="store_true", help="only say what would be done, and how long it takes")
    chosen = parser.parse_args(words)
    if chosen.device == "cuda" and not torch.cuda.is_available() and not chosen.plan:
        print("no CUDA device: --device cpu tries the parts without one", file=sys.stderr)
        return 2
    if chosen.plan:
        print(plan(parts(chosen.device, chosen.out or Path("results")), chosen.minutes))
        return 0
    today = datetime.date.today().isoformat()
    out = (chosen.out or ROOT / "bench" / "results" / f"{card_name(chosen.device)}-{today}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = visit(chosen.device, chosen.minutes, out)
    print(f"{out.name}.tar.gz", flush=True)
    bad = {"failed"} if chosen.device == "cuda" else {"failed", "out of time", "not begun"}
    return 1 if any(outcome.result in bad for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
