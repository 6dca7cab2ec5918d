"""The parts of a GPU visit, in order, each in a separate process.

Correctness comes first, and an error ends the visit: the CUDA kernels' instructions against the twins that the
emulator runs in their place, every backend's results on the device, opcheck, `torch.compile` and CUDA graphs, and the
memory checker. Then what only a GPU can tell: host time (`host`), and all cases against their peers (the suite ``gpu``
of `mpoe bench`).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
# Compares every instruction that the emulator imitates with the device's own; fails if one differs.
TWINS = ROOT / "tools" / "cuda_probes.py"
# Kernels compiled beforehand, see tools/warm_triton.py.
WARM = ROOT / "build" / "warm_triton"
UNABLE = 2


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: of its log file.
        what: what it does, in words.
        command: its words.
        minutes: how long it takes on a GPU without a limit; the budget is divided in proportion.
        environment: variables in addition to this process's.
        missing: why it cannot run here; empty if it can.
        unable: exit status with which the process says that it cannot run.
        judges: if it fails, nothing after it is worth measuring.
        knows_minutes: takes ``--minutes``, and ends by itself after that time.
    """

    name: str
    what: str
    command: Sequence[str]
    minutes: float
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""
    unable: int | None = None
    judges: bool = False
    knows_minutes: bool = False


def capability(device: str) -> str:
    """The device's capability as in ``TORCH_CUDA_ARCH_LIST``, e.g. ``9.0a``."""
    major, minor = torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else (8, 0)
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def nvcc() -> str | None:
    """The CUDA compiler, where setup.py looks for it."""
    named = os.environ.get("CUDACXX")
    return shutil.which(named) if named else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _built_already() -> bool:
    """Whether the checkout already has CUDA kernels for this card, built elsewhere."""
    from mpoe_kernels.cuda_library import unavailable_reasons

    return not unavailable_reasons()


def parts(device: str, out: Path) -> list[Part]:
    """The parts of a visit, in order."""
    on_gpu = device == "cuda"
    # Without tests/conftest.py: a GPU machine may lack the packages that it needs.
    python, tests = sys.executable, ["-p", "no:cacheprovider", "-q", "--tb=short", "--confcutdir", "tests/device"]
    no_pytest = "" if importlib.util.find_spec("pytest") else "pytest is not installed"
    workers = []
    if on_gpu and importlib.util.find_spec("xdist") is not None:  # every shape compiles its own kernels
        workers = ["-n", str(min(8, len(os.sched_getaffinity(0))))]
    no_gpu = "" if on_gpu else "it needs a GPU"
    no_nvcc = no_gpu or ("" if nvcc() else "no nvcc")
    built = on_gpu and _built_already()
    warm = {"TRITON_CACHE_DIR": str(WARM)} if on_gpu and WARM.is_dir() else {}
    on_device = {"MPOE_TEST_DEVICE": device, **warm}
    if on_gpu:  # tests of these backends must fail, not skip, if the backend is missing
        on_device["MPOE_TEST_REQUIRED"] = "eager triton cuda" if built or not no_nvcc else "eager triton"
    tiny = [] if on_gpu else ["--scale", "tiny", "--threads", "1", "--backend", "eager"]
    compare = ["mpoe", "bench", "--suite", "gpu", "--device", device, "--out", str(out / "times"), *tiny]
    checker = shutil.which("compute-sanitizer") or ""
    folder = "tests/device"
    pytest = [python, "-m", "pytest", *tests]

    return [
        Part(
            "build",
            "the CUDA kernels for this card",
            [python, "setup.py", "-q", "build_ext", "--inplace"],
            4,
            {"MPOE_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": capability(device)},
            no_nvcc or ("they are here already" if built else ""),
            judges=True,
        ),
        Part("machine", "what is installed", [python, "-m", "mpoe_kernels.info"], 0.2),
        Part("card", "the card", ["nvidia-smi"], 0.1, missing="" if shutil.which("nvidia-smi") else "no nvidia-smi"),
        Part(
            "twins",
            "instructions against their emulated twins",
            [python, str(TWINS), "--arch", capability(device).replace(".", "")],
            1,
            missing=no_gpu,
            unable=UNABLE,
            judges=True,
        ),
        Part(
            "results",
            "every backend on the device",
            [*pytest, *workers, *(f"{folder}/test_device_{name}.py" for name in ("ops", "gated", "router"))],
            3,
            on_device,
            no_pytest,
            judges=True,
        ),
        Part(
            "graphs",
            "opcheck, torch.compile, CUDA graphs",
            [*pytest, *workers, f"{folder}/test_device_graphs.py"],
            2,
            on_device,
            no_pytest,
            judges=True,
        ),
        Part(
            "memory",
            "the memory checker over a few small cases",
            [checker, "--error-exitcode", "1", *pytest, f"{folder}/test_device_ops.py", "-k", "no_tokens or two_runs"],
            2,
            on_device,
            no_gpu or no_pytest or ("" if checker else "no compute-sanitizer"),
            judges=True,
        ),
        Part(
            "host",
            "host time of ops and layers",
            [python, "-m", "mpoe_bench.visit.host", "--device", device, "--out", str(out)],
            3,
            warm,
            knows_minutes=True,
        ),
        Part("times", "all cases against their peers", [python, "-m", *compare], 8, warm, knows_minutes=True),
    ]
