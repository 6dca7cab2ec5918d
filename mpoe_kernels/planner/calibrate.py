"""Optional measurement of this machine: GEMM rates, the cost of short GEMMs and of calls, bandwidths."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from mpoe_kernels.planner.cost import half_size
from mpoe_kernels.planner.device import forget, hardware_of
from mpoe_kernels.planner.hardware import HARDWARE, ByDtype, Hardware
from mpoe_kernels.planner.measured import cache_file, key, read, write


def _seconds(function: Callable[[], object], device: torch.device, budget: float = 0.3) -> float:
    """Shortest of several samples of one call.

    A CPU is timed by the calling thread's CPU time: that thread takes part in every parallel region, and time that
    other processes spend on its core does not count.
    """
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.thread_time

    def sample(repeats: int) -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = clock()
        for _ in range(repeats):
            function()
        if on_gpu:
            torch.cuda.synchronize(device)
        return (clock() - start) / repeats

    first = sample(1)
    if first > budget:
        return first
    once, samples = max(sample(1), 1e-7), 10
    repeats = max(1, min(1000, int(budget / samples / once)))
    return min(sample(repeats) for _ in range(samples))


def _measure(hardware: Hardware, device: torch.device) -> dict[str, Any]:
    def mm_seconds(m: int, n: int, k: int, dtype: torch.dtype) -> float:
        a, b = torch.ones(m, k, dtype=dtype, device=device), torch.ones(k, n, dtype=dtype, device=device)
        out = torch.empty(m, n, dtype=dtype, device=device)
        return _seconds(lambda: torch.mm(a, b, out=out), device)

    rates, halves, calls = {}, {}, {}
    for name in ByDtype._fields:
        dtype = getattr(torch, name)
        m, n, k = (4096, 4096, 4096) if hardware.kind == "gpu" else (512, 3072, 768)
        rates[name] = 2 * m * n * k / mm_seconds(m, n, k, dtype)
        # Smaller ones bypass the library that larger ones call.
        calls[name] = max(mm_seconds(32, 32, 32, dtype) - 2 * 32**3 / rates[name], 1e-7)
        halves[name] = hardware.half_size.of(dtype)
        # A GPU's short GEMMs are memory-bound, so they do not show the cost of few rows.
        if hardware.kind == "cpu":
            m, n, k = 16, 384, 384
            short = mm_seconds(m, n, k, dtype) - calls[name]
            halves[name] = half_size(m, n, k, 2 * m * n * k / short / rates[name]) if short > 0 else 0.5

    def copy_rate(size: int) -> float:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * size / _seconds(lambda: target.copy_(source), device)

    new = 64 << 20  # more than allocators keep
    return {
        "flops": rates,
        "half_size": halves,
        "call_seconds": calls,
        "bandwidth": copy_rate(4 * hardware.cache_bytes),
        "new_memory_bandwidth": new
        / _seconds(lambda: torch.empty(new, dtype=torch.uint8, device=device).zero_(), device),
        "cache_bandwidth": copy_rate(hardware.cache_bytes // 8),
    }


def calibrate(device: str | torch.device = "cpu") -> Hardware:
    """Measure a device of this machine (under a minute), keep the numbers, and return them.

    Args:
        device: ``"cpu"``, ``"cuda"``, ...; a CPU is measured with the current number of PyTorch threads.

    Returns:
        What `hardware_of` returns from now on, in this process and in later ones. Ops keep the choices that they have
        already made in this process.

    Raises:
        ValueError: a name from the hardware table rather than a device, or a device that this machine does not have.
        OSError: the cache folder cannot be written.
    """
    if isinstance(device, str) and device.lower() in HARDWARE:
        raise ValueError(f"only a device of this machine can be measured, such as 'cpu' or 'cuda'; got {device!r}")
    hardware = hardware_of(device)
    found = torch.device(device)
    threads = torch.get_num_threads() if found.type == "cpu" else 1
    name = "cpu" if found.type == "cpu" else torch.cuda.get_device_properties(found).name
    entry = _measure(hardware, found)
    path = cache_file()
    write(path, {**read(path), key(name, threads): entry})
    forget()
    return hardware_of(device)
