"""The environment of the kernels: ``python -m mpoe_kernels.info`` prints it, ``--json`` as JSON.

It also works without compiled kernels, Triton or a GPU, and says why they are missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mpoe_kernels.backends import backend_reasons
from mpoe_kernels.compiled import CompiledLibrary
from mpoe_kernels.contract.kept import choices_file, processor_name
from mpoe_kernels.contract.timing import SETTING
from mpoe_kernels.cuda_library import CUDA_LIBRARY
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.version import __version__

PACKAGES = ("torch", "triton", "numpy")


def installed_version(package: str) -> str:
    """Version of a distribution, or ``"not installed"``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def usable_cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> list[str]:
    devices = [f"cpu ({platform.machine()})"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append(f"cuda:{index} ({torch.cuda.get_device_name(index)}, sm_{major}{minor})")
    return devices


def _told(library: CompiledLibrary) -> dict[str, str] | None:
    if library.reasons:
        return None
    return {**library.info, "path": str(library.path)}


def collect(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Everything that `show` prints, JSON-able.

    Args:
        packages: distributions to report.

    Returns:
        ``mpoe``, ``python``, ``platform``: versions. ``packages``: version of each.
            ``torch_built_for``: toolkit of
        this torch. ``devices``. ``cores``: usable ones; ``torch_threads``: threads of CPU kernels;
            ``torch_isa``: the
        instructions torch uses. ``processor``: its name. ``choices``: the file of timed choices
        (see `mpoe_kernels.contract.autotune`), ``None`` if nothing is timed. ``native``, ``cuda``:
        what the compiled kernels were built from and which instructions they use, see
        `CompiledLibrary.info`; ``None`` if there are none. ``backends``: why each cannot run here,
        an empty list if it can.
    """
    toolkit = "CPU"
    if torch.version.cuda:
        toolkit = f"CUDA {torch.version.cuda}"
    if torch.version.hip:
        toolkit = f"ROCm {torch.version.hip}"
    return {
        "mpoe": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in packages},
        "torch_built_for": toolkit,
        "devices": _devices(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "processor": processor_name(),
        "choices": None if os.environ.get(SETTING) == "0" else str(choices_file()),
        "native": _told(NATIVE_LIBRARY),
        "cuda": _told(CUDA_LIBRARY),
        "backends": backend_reasons(),
    }


def native_summary(native: dict[str, str] | None) -> str:
    """One line about the compiled kernels."""
    if native is None:
        return "no (see below)"
    lowered = ""
    if native["isa_used"] != native["isa_detected"]:
        lowered = f", {native['isa_used']} in use (MPOE_CPU_ISA)"
    return (
        f"built by {native['compiler']} for {native['torch']} torch; instructions: "
        f"{native['isa_detected']} found of {native['isa_compiled'].replace(' ', ', ')} "
        f"compiled{lowered}"
    )


def cuda_summary(cuda: dict[str, str] | None) -> str:
    """One line about the compiled CUDA kernels."""
    if cuda is None:
        return "no (see below)"
    architectures = cuda["architectures"].replace(" ", ", ")
    return f"built by {cuda['compiler']} against torch {cuda['torch']} for {architectures}"


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """All facts except the backends, as (name, text)."""
    return [
        ("Python", f"{facts['python']} on {facts['platform']}"),
        *facts["packages"].items(),
        ("torch built for", facts["torch_built_for"]),
        ("devices", ", ".join(facts["devices"])),
        (
            "cores",
            f"{facts['cores']} usable, torch takes {facts['torch_threads']} threads and "
            f"{facts['torch_isa']}",
        ),
        ("processor", facts["processor"] or "unknown"),
        ("choices", facts["choices"] or f"by FLOPs alone ({SETTING}=0)"),
        ("native kernels", native_summary(facts["native"])),
        ("CUDA kernels", cuda_summary(facts["cuda"])),
    ]


def show(facts: dict[str, Any]) -> str:
    """The facts of `collect` as text."""
    lines = [f"mpoe {facts['mpoe']}"]
    for name, text in rows(facts):
        lines.append(f"  {name:<16}{text}")
    lines.append("kernel backends")
    for name, reasons in facts["backends"].items():
        lines.append(f"  {name:<16}{'no' if reasons else 'yes'}")
        for reason in reasons:
            # Paths are not wrapped, so that they can be copied.
            wrapped = textwrap.wrap(reason, 80, break_long_words=False, break_on_hyphens=False)
            lines += [f"{'':<18}{line}" for line in wrapped]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m mpoe_kernels.info``."""
    parser = argparse.ArgumentParser(
        prog="python -m mpoe_kernels.info", description="What the kernels run on here."
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    facts = collect()
    print(json.dumps(facts, indent=2) if parser.parse_args(arguments).json else show(facts))


if __name__ == "__main__":
    main()
