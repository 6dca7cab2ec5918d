"""What a machine can do: the numbers behind every predicted time.

Accelerators: the vendors' data sheets, dense rates (no structured sparsity), the variant named in `Hardware.note`.
Reachable fractions, cache bandwidths and overheads are typical of public benchmarks, not data-sheet numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch

_MIB, _GIB = 2**20, 2**30
# Of the compiled kernels on an EPYC with AVX512-BF16, see `Hardware`; `planner.machine` measures them elsewhere.
TILE_RATE, STORE_SECONDS = 1.13, 65e-9


class ByDtype(NamedTuple):
    """A value for each dtype that GEMMs are planned for."""

    float32: float
    bfloat16: float
    float16: float
    float64: float

    def of(self, dtype: torch.dtype) -> float:
        """Raises TypeError for a dtype that GEMMs are not planned for."""
        name = str(dtype).removeprefix("torch.")
        if not isinstance(dtype, torch.dtype) or name not in self._fields:
            raise TypeError(f"dtype must be a torch.dtype, one of {', '.join(self._fields)}; got {dtype!r}")
        return float(getattr(self, name))


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: key of `HARDWARE`.
        kind: ``cpu`` or ``gpu``.
        peak_flops: FLOP/s of GEMMs by dtype, of the whole device (for a CPU: of ``threads`` cores). float32 is IEEE
            float32, PyTorch's default; see `with_tf32`.
        tf32_flops: FLOP/s of float32 GEMMs whose inputs are rounded to TF32; 0 if there is no such mode.
        gemm_fraction: fraction of ``peak_flops`` that large GEMMs reach in practice, by dtype.
        half_size: rows m at which a GEMM reaches half of that, by dtype; see `gemm_efficiency`.
        bandwidth: bytes/s to and from memory.
        new_memory_bandwidth: bytes/s of the first writes to memory that an allocator has just got from the system (page
            faults on a CPU); infinite where allocators keep memory (a GPU).
        cache_bytes: last-level cache.
        cache_bandwidth: bytes/s to and from it.
        sram_bytes: fast memory of one core: a CPU's L2, a GPU's shared memory per multiprocessor.
        sram_bandwidth: bytes/s to and from the shared memory of all of a GPU's multiprocessors; 0 for a CPU.
        matrix_unit: the unit that executes a GPU's best matrix instruction: ``warp``, ``warpgroup`` or
            ``multiprocessor``; empty for a CPU.
        units: cores or multiprocessors that a GEMM must be spread over.
        memory_bytes: capacity.
        link_bandwidth: bytes/s that one device sends to others of its node.
        network_bandwidth: bytes/s that one device sends to other nodes.
        launch_seconds: overhead of a step.
        call_seconds: overhead of each GEMM of a grouped step if each is a separate call (a CPU), by dtype; 0 if one
            launch serves all experts.
        tile_rate: FLOP/s of the multiply-adds in the compiled CPU kernels' register tiles, divided by
            `flops_per_second` (which includes costs that those kernels' model counts separately), by dtype; 0 for a
            GPU.
        store_seconds: time in which a core rounds one of their register tiles and writes it where the next product
            reads it, by dtype; 0 for a GPU.
        note: where the numbers come from.
    """

    name: str
    kind: str
    peak_flops: ByDtype
    tf32_flops: float
    gemm_fraction: ByDtype
    half_size: ByDtype
    bandwidth: float
    new_memory_bandwidth: float
    cache_bytes: int
    cache_bandwidth: float
    sram_bytes: int
    sram_bandwidth: float
    matrix_unit: str
    units: int
    memory_bytes: int
    link_bandwidth: float
    network_bandwidth: float
    launch_seconds: float
    call_seconds: ByDtype
    tile_rate: ByDtype
    store_seconds: ByDtype
    note: str

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """Reachable FLOP/s of large GEMMs in ``dtype``.

        Raises:
            TypeError: a dtype that GEMMs are not planned for.
        """
        return self.peak_flops.of(dtype) * self.gemm_fraction.of(dtype)

    def ridge(self, dtype: torch.dtype) -> float:
        """FLOPs per byte above which large GEMMs are compute-bound rather than memory-bound."""
        return self.flops_per_second(dtype) / self.bandwidth

    def with_tf32(self) -> Hardware:
        """The same device when float32 GEMMs may use TF32."""
        if not self.tf32_flops:
            return self
        return replace(self, peak_flops=self.peak_flops._replace(float32=self.tf32_flops))


def by_dtype(float32: float, bfloat16: float, float64: float, float16: float | None = None) -> ByDtype:
    """A value for each dtype; float16 shares bfloat16's unless it is given."""
    return ByDtype(float32, bfloat16, bfloat16 if float16 is None else float16, float64)


def _gpu(
    name: str,
    *,
    teraflops: tuple[float, float, float],
    tf32: float,
    bandwidth: float,
    cache_mib: int,
    cache_bandwidth: float,
    sram_kib: int,
    units: int,
    matrix: tuple[str, int],
    memory: float,
    link: float,
    note: str,
    network: float = 50e9,
) -> Hardware:
    """``matrix``: `Hardware.matrix_unit`, and a multiprocessor's 16-bit FLOPs per clock, against 128 bytes of shared
    memory."""
    return Hardware(
        name=name,
        kind="gpu",
        peak_flops=by_dtype(*(t * 1e12 for t in teraflops)),
        tf32_flops=tf32 * 1e12,
        gemm_fraction=by_dtype(0.8, 0.65, 0.8),
        half_size=by_dtype(8.0, 16.0, 8.0),
        bandwidth=bandwidth * 1e12,
        new_memory_bandwidth=math.inf,
        cache_bytes=cache_mib * _MIB,
        cache_bandwidth=cache_bandwidth * 1e12,
        sram_bytes=sram_kib * 1024,
        sram_bandwidth=128 * teraflops[1] * 1e12 / matrix[1],
        matrix_unit=matrix[0],
        units=units,
        memory_bytes=round(memory * 1e9),
        link_bandwidth=link * 1e9,
        network_bandwidth=network,
        launch_seconds=4e-6,
        call_seconds=by_dtype(0.0, 0.0, 0.0),
        tile_rate=by_dtype(0.0, 0.0, 0.0),
        store_seconds=by_dtype(0.0, 0.0, 0.0),
        note=note,
    )


def _cpu(
    name: str,
    cores: int,
    *,
    gigaflops_per_core: tuple[float, float, float, float],
    fractions: tuple[float, float, float],
    half_sizes: tuple[float, float, float],
    core_bandwidth: float,
    bandwidth: float,
    cache_mib: int,
    sram_mib: int,
    memory_gib: int,
    note: str,
) -> Hardware:
    """``core_bandwidth``: memory bandwidth of one core; all cores together get at most ``bandwidth``."""
    return Hardware(
        name=name,
        kind="cpu",
        peak_flops=by_dtype(*(g * 1e9 * cores for g in gigaflops_per_core)),
        tf32_flops=0.0,
        gemm_fraction=by_dtype(*fractions),
        half_size=by_dtype(*half_sizes),
        bandwidth=min(cores * core_bandwidth, bandwidth) * 1e9,
        new_memory_bandwidth=2.5e9 * cores,
        cache_bytes=cache_mib * _MIB,
        cache_bandwidth=90e9 * cores,
        sram_bytes=sram_mib * _MIB,
        sram_bandwidth=0.0,
        matrix_unit="",
        units=cores,
        memory_bytes=memory_gib * _GIB,
        link_bandwidth=12.5e9,
        network_bandwidth=12.5e9,
        launch_seconds=2e-6,
        call_seconds=by_dtype(1.5e-6, 10e-6, 1.5e-6),
        tile_rate=by_dtype(*[TILE_RATE] * 3),
        store_seconds=by_dtype(*[STORE_SECONDS] * 3),
        note=note,
    )


def _generic_cpu(cores: int) -> Hardware:
    return _cpu(
        "cpu-generic",
        cores,
        gigaflops_per_core=(100.0, 50.0, 50.0, 2.0),
        fractions=(0.9, 0.7, 0.9),
        half_sizes=(5.0, 5.0, 5.0),
        core_bandwidth=15.0,
        bandwidth=50.0,
        cache_mib=32,
        sram_mib=1,
        memory_gib=32,
        note=f"{cores} cores with two 256-bit FMA units at 3.1 GHz, two channels of DDR4-3200; "
        "bfloat16 by conversion, float16 one by one",
    )


def _bfloat16_cpu(cores: int) -> Hardware:
    return _cpu(
        "cpu-avx512-bf16",
        cores,
        gigaflops_per_core=(112.0, 224.0, 56.0, 2.0),
        fractions=(0.85, 0.95, 0.85),
        half_sizes=(5.0, 5.0, 5.0),
        core_bandwidth=30.0,
        bandwidth=350.0,
        cache_mib=32,
        sram_mib=1,
        memory_gib=256,
        note=f"{cores} cores with one 512-bit FMA and VDPBF16PS a cycle at 3.5 GHz, twelve channels of DDR5-4800; "
        "float16 one by one",
    )


# Entries of the table for any number of cores.
CPUS = MappingProxyType({"cpu-generic": _generic_cpu, "cpu-avx512-bf16": _bfloat16_cpu})

HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
        "cpu-generic": _generic_cpu(cores=8),
        "cpu-avx512-bf16": _bfloat16_cpu(cores=48),
        "a100": _gpu(
            "a100",
            teraflops=(19.5, 312, 19.5),
            tf32=156,
            bandwidth=2.039,
            cache_mib=40,
            cache_bandwidth=4.0,
            sram_kib=164,
            units=108,
            matrix=("warp", 2048),
            memory=80,
            link=300,
            network=25e9,
            note="NVIDIA A100 SXM 80 GB data sheet; float64 by tensor cores; NVLink 3; one 200 Gb/s adapter per GPU",
        ),
        "h100": _gpu(
            "h100",
            teraflops=(67, 989, 67),
            tf32=495,
            bandwidth=3.35,
            cache_mib=50,
            cache_bandwidth=5.5,
            sram_kib=228,
            units=132,
            matrix=("warpgroup", 4096),
            memory=80,
            link=450,
            note="NVIDIA H100 SXM data sheet; float64 by tensor cores; NVLink 4; one 400 Gb/s adapter per GPU",
        ),
        "h100-pcie": _gpu(
            "h100-pcie",
            teraflops=(51, 756, 51),
            tf32=378,
            bandwidth=2.039,
            cache_mib=50,
            cache_bandwidth=4.5,
            sram_kib=228,
            units=114,
            matrix=("warpgroup", 4096),
            memory=80,
            link=300,
            note="NVIDIA H100 PCIe data sheet; float64 by tensor cores; NVLink bridge between two cards; one 400 Gb/s "
            "adapter per GPU",
        ),
        "h100-nvl": _gpu(
            "h100-nvl",
            teraflops=(60, 835, 60),
            tf32=418,
            bandwidth=3.9,
            cache_mib=50,
            cache_bandwidth=5.5,
            sram_kib=228,
            units=132,
            matrix=("warpgroup", 4096),
            memory=94,
            link=300,
            note="NVIDIA H100 NVL data sheet, per GPU; float64 by tensor cores; NVLink bridge between two cards; one "
            "400 Gb/s adapter per GPU",
        ),
        "h200": _gpu(
            "h200",
            teraflops=(67, 989, 67),
            tf32=495,
            bandwidth=4.8,
            cache_mib=50,
            cache_bandwidth=5.5,
            sram_kib=228,
            units=132,
            matrix=("warpgroup", 4096),
            memory=141,
            link=450,
            note="NVIDIA H200 SXM data sheet; float64 by tensor cores; NVLink 4; one 400 Gb/s adapter per GPU",
        ),
        "b200": _gpu(
            "b200",
            teraflops=(80, 2250, 40),
            tf32=1100,
            bandwidth=8.0,
            cache_mib=126,
            cache_bandwidth=10.0,
            sram_kib=228,
            units=148,
            matrix=("multiprocessor", 8192),
            memory=180,
            link=900,
            note="NVIDIA HGX B200 data sheet, per GPU; NVLink 5; one 400 Gb/s adapter per GPU",
        ),
        "mi300": _gpu(
            "mi300",
            teraflops=(163.4, 1307.4, 163.4),
            tf32=653.7,
            bandwidth=5.3,
            cache_mib=256,
            cache_bandwidth=17.2,
            sram_kib=64,
            units=304,
            matrix=("warp", 2048),
            memory=192,
            link=448,
            note="AMD Instinct MI300X data sheet, matrix rates; Infinity Fabric; one 400 Gb/s adapter per GPU",
        ),
    }
)
