"""What a run may measure on this machine, and what readers must know of it."""

import datetime
import platform
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from subprocess import DEVNULL

import torch

from mpoe.config.checks import check_choice
from mpoe_bench.suites import SCALES, SUITES
from mpoe_kernels import backend_reasons
from mpoe_kernels.backends import AUTO, BACKENDS, Request
from mpoe_kernels.info import collect, usable_cores

LIBRARIES = ("torch", "triton", "transformers", "numpy")
DEVICES = ("cpu", "cuda")
PHASE_NAMES = ("forward", "train", "graph")
EAGER = "eager"
ALL = "all"


def backends_to_measure(names: str | None, suite: str, device: str) -> tuple[str, ...]:
    """The backends that a run measures.

    Args:
        names: ``None`` (auto, which users get, and eager, which every installation has), ``"all"``
            (auto and every backend that runs here), or names separated by commas. ``auto`` is the
            package's own choice.
        suite: the suite to run; by default, quick measures only auto.
        device: what the backends of ``"all"`` must run on; named backends are checked only when
            they compute.

    Returns:
        Names, each once. Where eager is the only backend, auto means the same and eager is named
        instead.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    request = Request("dispatch", device, torch.float32)
    here = tuple(
        name for name, backend in BACKENDS.items() if not backend.unsupported_reasons(request)
    )
    if names is None or names == ALL:
        if here == (EAGER,):
            return here
        if names == ALL:
            return (AUTO, *here)
        if suite == "quick":
            return (AUTO,)
        return (AUTO, EAGER)
    reasons = backend_reasons()
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        check_choice("backend", name, (ALL, AUTO, *reasons))
        if reasons.get(name):
            raise ValueError(f"backend {name!r} cannot run here: {'; '.join(reasons[name])}")
    return chosen


def check_options(
    suite: str, device: str, threads: int | None, scale: str, phases: Sequence[str]
) -> int:
    """Refuse options that cannot be run, before any work; returns the number of threads. Backends
    are checked by `backends_to_measure`.

    Raises:
        ValueError: names the option, what was expected, and what was given.
    """
    check_choice("suite", suite, SUITES)
    check_choice("device", device, DEVICES)
    check_choice("scale", scale, list(SCALES))
    for phase in phases:
        check_choice("phases", phase, PHASE_NAMES)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu: torch finds no CUDA device here; got 'cuda'")
    if device == "cuda" and suite == "planner":
        raise ValueError("suite must not be planner on cuda: its cases are a CPU's; got 'planner'")
    cores = usable_cores()
    if threads is None:
        # Products of tiny sizes gain nothing from a second thread, and waiting for it costs.
        threads = 1 if scale == "tiny" else cores
    if not 1 <= threads <= cores:
        raise ValueError(
            f"threads must be between 1 and {cores}, the processors usable here; got {threads}"
        )
    return threads


def revision() -> str | None:
    """The measured commit, with ``+`` if files differ from it; ``None`` outside a checkout."""
    here = Path(__file__)
    git = partial(subprocess.check_output, text=True, cwd=here.parent, stderr=DEVNULL, timeout=10)
    try:
        # an installed copy may be inside another checkout
        git(["git", "ls-files", "--error-unmatch", here.name])
        described = git(["git", "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+"])
    except (OSError, subprocess.SubprocessError):
        return None
    return described.strip()


def describe(device: str, threads: int) -> dict:
    """What readers must know to compare results; it names nobody's machine or folders."""
    known = collect(LIBRARIES)
    return {
        "processor": known["processor"] or platform.machine(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "device": device,
        "cores": known["cores"],
        "threads": threads,
        "isa": known["torch_isa"],
        "native_isa": (known["native"] or {}).get("isa_used"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": known["python"],
        "mpoe": known["mpoe"],
        "revision": revision(),
        "libraries": known["packages"],
        "backends": [name for name, reasons in known["backends"].items() if not reasons],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
