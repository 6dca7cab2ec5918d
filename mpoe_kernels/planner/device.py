"""Whose numbers to plan with: an entry of the hardware table, or a device of this machine."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from mpoe_kernels.planner.hardware import CPUS, HARDWARE, Hardware
from mpoe_kernels.planner.machine import Constants, constants, with_constants
from mpoe_kernels.planner.machine import forget as forget_machine
from mpoe_kernels.planner.measured import calibrated, forget_file


@lru_cache(maxsize=1)
def _cpu_name() -> str:
    """The table entry closest to this machine's processor."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: no flags to read
        return "cpu-generic"
    return "cpu-avx512-bf16" if "avx512_bf16" in flags else "cpu-generic"


# The number that plans are priced for when they must not depend on the number of threads. With 1 to 8 threads, the
# native kernels then took 1.02 to 1.06 times as long as the best choice, and 1.2 times with 16 (predicted; means of 480
# products).
DETERMINISTIC_THREADS = 4


def planned_threads() -> int:
    """Number of CPU threads that plans are priced for: PyTorch's, or a fixed one if PyTorch must be deterministic.

    The cheapest strategy depends on that number, and the rounding depends on the strategy. After
    ``torch.use_deterministic_algorithms(True)`` the choice is therefore the same on any number of threads.
    """
    return DETERMINISTIC_THREADS if torch.are_deterministic_algorithms_enabled() else torch.get_num_threads()


@lru_cache(maxsize=64)
def _this_cpu(threads: int, found: Constants | None) -> Hardware:
    return calibrated(with_constants(CPUS[_cpu_name()](threads), found), "cpu", threads)


def one_core() -> Hardware:
    """Numbers of one core of this machine's CPU, without those of `planner.machine`."""
    return _this_cpu(1, None)


def may_round_to_tf32(dtype: torch.dtype) -> bool:
    """Whether PyTorch may round the factors of a product to TF32 on a GPU, whichever setting was used.

    ``torch.backends.cuda.matmul.allow_tf32`` would raise once a program has used PyTorch's newer settings.
    """
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


@lru_cache(maxsize=64)
def _this_gpu(index: int) -> Hardware | None:
    name = torch.cuda.get_device_properties(index).name
    words = name.lower()
    found = [key for key in HARDWARE if HARDWARE[key].kind == "gpu" and all(part in words for part in key.split("-"))]
    # "NVIDIA H100 PCIe" must match h100-pcie before h100.
    return calibrated(HARDWARE[max(found, key=len)], name, 1) if found else None


def hardware_of(device: str | torch.device) -> Hardware:
    """The numbers of a device.

    Args:
        device: ``"cpu"`` (this machine, with `planned_threads` cores), ``"cuda"`` (the current GPU),
            ``"cuda:1"`` (looked up by its name, with TF32 where PyTorch may use it) or the same as ``torch.device``; or
            a name of `HARDWARE`, which may be another machine. Measurements of the CPU (`planner.machine`) and a
            calibration of this machine (`calibrate`) override the table.

    Raises:
        TypeError: neither a string nor a device.
        ValueError: a device that is not in the table, or a GPU that this machine does not have.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a string or a torch.device; got {type(device).__name__} {device!r}")
    if isinstance(device, str) and device.lower() in HARDWARE:
        return HARDWARE[device.lower()]
    known = ", ".join(["cpu", *HARDWARE])
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be one of {known}, or a device of this machine; got {device!r}") from None
    if found.type == "cpu":
        return _this_cpu(planned_threads(), constants())
    if found.type != "cuda":
        raise ValueError(f"device must be one of {known}, or a CPU or CUDA device of this machine; got {device!r}")
    if not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r} is not here; name one of {known}")
    index = torch.cuda.current_device() if found.index is None else found.index
    hardware = _this_gpu(index)
    if hardware is None:
        name = torch.cuda.get_device_properties(index).name
        raise ValueError(f"no numbers are known for {name}; name the nearest of {known}")
    return hardware.with_tf32() if may_round_to_tf32(torch.float32) else hardware


def hardware_here(device: str | torch.device) -> Hardware:
    """Numbers to compare strategies with on a device of this machine; if it is unknown, those of the nearest entry."""
    try:
        return hardware_of(device)
    except ValueError:
        return HARDWARE["a100"]


def forget() -> None:
    """Read the saved measurements again when they are next needed."""
    forget_file()
    forget_machine()
    _this_cpu.cache_clear()
    _this_gpu.cache_clear()
