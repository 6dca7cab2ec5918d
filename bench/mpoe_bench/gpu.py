"""`bench/gpu.sh`: the steps of a visit to a GPU, each a process with a limit, within one budget of time.

Correctness comes first: the CUDA kernels' instructions against the twins that the emulator runs in their place, every
backend's results on the device, then opcheck, compiled and CUDA graphs. Times come last; there a contender that is
wrong gets none. With ``--device cpu`` the same steps run on tiny sizes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from mpoe_bench.section import FOLDERS

ROOT = Path(__file__).resolve().parents[2]
# Compares every instruction that the emulator imitates with the device's own; exits with an error if one differs.
TWINS = ROOT / "tools" / "cuda_probes.py"
RESERVE = 20.0  # seconds kept for the report


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: of its log file.
        what: in words.
        command: words.
        share: the most of the whole time that it may take.
        environment: variables on top of this process's.
        missing: why it cannot run here; empty if it can.
        unable: exit status by which the process says that it cannot.
    """

    name: str
    what: str
    command: Sequence[str]
    share: float
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""
    unable: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step: ``passed``, ``failed``, ``out of time`` or ``skipped``, and the last line it printed."""

    name: str
    what: str
    result: str
    seconds: float
    detail: str


def _capability(device: str) -> str:
    """As ``TORCH_CUDA_ARCH_LIST`` spells it, e.g. ``9.0a``."""
    major, minor = torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else (8, 0)
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def nvcc() -> str | None:
    """The CUDA compiler, where setup.py looks for it."""
    named = os.environ.get("CUDACXX")
    return shutil.which(named) if named else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def steps(device: str, out: Path) -> list[Step]:
    """What is to be done, in order."""
    # Without the conftest above, whose packages a GPU machine need not have.
    python, tests = sys.executable, ["-p", "no:cacheprovider", "-q", "--tb=short", "--confcutdir", "tests/device"]
    no_pytest = "" if importlib.util.find_spec("pytest") else "pytest is not installed"
    if importlib.util.find_spec("xdist") is not None:  # every shape compiles kernels of its own: many cores help
        tests += ["-n", str(min(8, len(os.sched_getaffinity(0))))] if device == "cuda" else []
    missing_nvcc = "it needs a GPU" if device != "cuda" else "" if nvcc() else "no nvcc"
    on_device = {"MPOE_TEST_DEVICE": device}
    if device == "cuda":  # a test of a backend that should be there fails where it is not
        on_device["MPOE_TEST_REQUIRED"] = "eager triton" if missing_nvcc else "eager triton cuda"
    tiny = ["--scale", "tiny", "--threads", "1", "--backend", "eager"] if device == "cpu" else []
    measure = ["-m", "mpoe", "bench", "--suite", "gpu", "--device", device, "--out", str(out / "times"), *tiny]
    folder = "tests/device"
    return [
        Step(
            "build",
            "the CUDA kernels for this card",
            [python, "setup.py", "-q", "build_ext", "--inplace"],
            0.25,
            {"MPOE_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": _capability(device)},
            missing_nvcc,
        ),
        Step("machine", "what is installed", [python, "-m", "mpoe_kernels.info"], 0.05),
        Step("card", "the card", ["nvidia-smi"], 0.02, missing="" if shutil.which("nvidia-smi") else "no nvidia-smi"),
        Step(
            "twins",
            "instructions against their emulated twins",
            [python, str(TWINS), "--arch", _capability(device).replace(".", "")],
            0.08,
            missing="" if device == "cuda" else "it needs a GPU",
            unable=2,
        ),
        Step(
            "results",
            "every backend on the device",
            [python, "-m", "pytest", *tests, f"{folder}/test_device_ops.py"],
            0.28,
            on_device,
            no_pytest,
        ),
        Step(
            "graphs",
            "opcheck, torch.compile, CUDA graphs",
            [python, "-m", "pytest", *tests, f"{folder}/test_device_graphs.py"],
            0.1,
            on_device,
            no_pytest,
        ),
        Step("times", "all cases against their peers", [python, *measure], 1.0),
    ]


def run_step(step: Step, limit: float, out: Path) -> Outcome:
    """Run a process for at most ``limit`` seconds; its output goes into a log, without the names of folders."""
    if step.missing:
        return Outcome(step.name, step.what, "skipped", 0.0, step.missing)
    if limit < 1:
        return Outcome(step.name, step.what, "skipped", 0.0, "no time was left")
    command = list(step.command)
    if step.name == "times":
        command += ["--minutes", f"{max(limit - RESERVE, 1) / 60:.3f}"]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | dict(step.environment),
            timeout=limit + (RESERVE if step.name == "times" else 0),
        )
        text = done.stdout
        result = "passed" if done.returncode == 0 else "skipped" if done.returncode == step.unable else "failed"
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        text, result = partial.decode(errors="replace") if isinstance(partial, bytes) else partial, "out of time"
    text = FOLDERS.sub("", text)
    (out / f"{step.name}.log").write_text(text)
    lines = [line.strip(" =") for line in text.splitlines() if line.strip(" =")]
    return Outcome(step.name, step.what, result, time.monotonic() - began, lines[-1][:160] if lines else "")


def card_name(device: str) -> str:
    """``nvidia-h100-80gb-hbm3``; ``trial-on-cpu`` without a GPU."""
    if device == "cpu":
        return "trial-on-cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def report(outcomes: Sequence[Outcome], device: str, seconds: float) -> str:
    """The steps as Markdown."""
    lines = [
        f"# {card_name(device)}, {datetime.date.today().isoformat()}\n",
        f"`bench/gpu.sh --device {device}`, {seconds:.0f} s. The logs of the steps are in this folder, the times of"
        " all cases in [times](times/report.md).\n",
        "| step | | result | s | last line |",
        "|---|---|---|---:|---|",
    ]
    for outcome in outcomes:
        detail = outcome.detail.replace("|", "\\|")
        lines.append(f"| {outcome.name} | {outcome.what} | {outcome.result} | {outcome.seconds:.0f} | {detail} |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Run all steps; returns 1 if one failed, 2 if there is no such device."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all steps together")
    parser.add_argument("--out", type=Path, help="default: bench/results/<card>-<date>")
    chosen = parser.parse_args(words)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu tries the steps without one", file=sys.stderr)
        return 2
    today = datetime.date.today().isoformat()
    out = chosen.out or ROOT / "bench" / "results" / f"{card_name(chosen.device)}-{today}"
    if (out / "steps.json").exists():
        print(f"{out} holds earlier results; name another folder with --out", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    began, budget = time.monotonic(), 60 * chosen.minutes - RESERVE
    outcomes: list[Outcome] = []
    for step in steps(chosen.device, out):
        left = budget - (time.monotonic() - began)
        outcome = run_step(step, min(left, step.share * budget), out)
        outcomes.append(outcome)
        print(f"{outcome.name:<9}{outcome.result:<12}{outcome.seconds:5.0f} s  {outcome.detail}", flush=True)
        text = report(outcomes, chosen.device, time.monotonic() - began)
        (out / "report.md").write_text(text)  # after every step: a machine may be taken away
        (out / "steps.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=2) + "\n")
    print(f"{out / 'report.md'}", flush=True)
    return 1 if any(outcome.result == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
