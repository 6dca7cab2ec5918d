"""What a machine can do: the numbers behind every predicted time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

_GIGA, _TERA = 1e9, 1e12
_KIB, _MIB, _GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: as `hardware_of` takes it.
        kind: ``cpu`` or ``gpu``.
        peak_flops: FLOP/s of dense GEMMs by dtype; of the whole device (a CPU's: of ``threads`` threads).
        bandwidth: bytes/s of memory.
        cache_bytes: last-level cache, shared by the device's cores.
        sram_bytes: fast memory of one core (a CPU's L2, a GPU's shared memory per multiprocessor).
        memory_bytes: capacity of the memory.
        link_bandwidth: bytes/s in each direction that one device has to others in its node (NVLink, Infinity Fabric;
            a CPU's: its network).
        network_bandwidth: bytes/s in each direction that one device has to other nodes.
        launch_seconds: host and device overhead of one step.
        call_seconds: overhead of each GEMM of a grouped step where they are separate calls (a CPU); 0 where one
            launch serves all experts.
        gemm_fraction: part of the peak that large GEMMs reach in practice.
        half_size: GEMM sizes (m, n, k) at which half of that is reached.
        threads: CPU threads that the numbers are for (1 for a GPU).
        note: where the numbers come from.
    """

    name: str
    kind: str
    peak_flops: Mapping[torch.dtype, float]
    bandwidth: float
    cache_bytes: int
    sram_bytes: int
    memory_bytes: int
    link_bandwidth: float
    network_bandwidth: float
    launch_seconds: float
    call_seconds: float
    gemm_fraction: float
    half_size: tuple[float, float, float]
    threads: int = 1
    note: str = ""

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """Reachable FLOP/s of large GEMMs in ``dtype``."""
        return self.peak_flops[dtype] * self.gemm_fraction

    def ridge(self, dtype: torch.dtype) -> float:
        """FLOPs per byte above which large GEMMs, not memory, set the pace."""
        return self.flops_per_second(dtype) / self.bandwidth


def _peaks(float32: float, bfloat16: float, float64: float) -> Mapping[torch.dtype, float]:
    peaks = {torch.float32: float32, torch.bfloat16: bfloat16, torch.float16: bfloat16, torch.float64: float64}
    return MappingProxyType({dtype: teraflops * _TERA for dtype, teraflops in peaks.items()})


_TABLE = {
    "cpu-generic": Hardware(
        name="cpu-generic",
        kind="cpu",
        peak_flops=_peaks(0.1, 0.05, 0.05),
        bandwidth=10 * _GIGA,
        cache_bytes=32 * _MIB,
        sram_bytes=1 * _MIB,
        memory_bytes=16 * _GIB,
        link_bandwidth=1.25 * _GIGA,
        network_bandwidth=1.25 * _GIGA,
        launch_seconds=5e-6,
        call_seconds=2e-6,
        gemm_fraction=0.8,
        half_size=(4.0, 8.0, 8.0),
    )
}
HARDWARE: Mapping[str, Hardware] = MappingProxyType(_TABLE)


def hardware_of(device: str | torch.device) -> Hardware:
    """The table's entry for a device."""
    return replace(HARDWARE["cpu-generic"])
