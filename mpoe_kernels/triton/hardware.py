"""Numbers of GPUs, by which tiles are chosen.

From the vendors' data sheets, dense rates (no structured sparsity), the variant named in `Hardware.note`. Reachable
fractions, cache bandwidths and overheads are typical of public benchmarks, not data-sheet numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import torch

from mpoe_kernels.contract.precision import may_round_to_tf32

_MIB = 2**20


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
    """One GPU.

    Attributes:
        name: key of `HARDWARE`.
        peak_flops: FLOP/s of GEMMs by dtype. float32 is IEEE float32, PyTorch's default; see `with_tf32`.
        tf32_flops: FLOP/s of float32 GEMMs whose inputs are rounded to TF32; 0 if there is no such mode.
        gemm_fraction: fraction of ``peak_flops`` that large GEMMs reach in practice, by dtype.
        bandwidth: bytes/s to and from memory.
        cache_bytes: last-level cache.
        cache_bandwidth: bytes/s to and from it.
        sram_bytes: shared memory per multiprocessor.
        sram_bandwidth: bytes/s to and from the shared memory of all multiprocessors.
        matrix_unit: the unit that executes the best matrix instruction: ``warp``, ``warpgroup`` or ``multiprocessor``.
        units: multiprocessors.
        memory_bytes: capacity.
        link_bandwidth: bytes/s that one device sends to others of its node.
        network_bandwidth: bytes/s that one device sends to other nodes.
        launch_seconds: overhead of a step.
        note: where the numbers come from.
    """

    name: str
    peak_flops: ByDtype
    tf32_flops: float
    gemm_fraction: ByDtype
    bandwidth: float
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
    note: str

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """Reachable FLOP/s of large GEMMs in ``dtype``.

        Raises:
            TypeError: a dtype that GEMMs are not planned for.
        """
        return self.peak_flops.of(dtype) * self.gemm_fraction.of(dtype)

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
        peak_flops=by_dtype(*(t * 1e12 for t in teraflops)),
        tf32_flops=tf32 * 1e12,
        gemm_fraction=by_dtype(0.8, 0.65, 0.8),
        bandwidth=bandwidth * 1e12,
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
        note=note,
    )


HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
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


@lru_cache(maxsize=64)
def _nearest(name: str) -> Hardware:
    words = name.lower()
    found = [key for key in HARDWARE if all(part in words for part in key.split("-"))]
    # "NVIDIA H100 PCIe" must match h100-pcie before h100.
    return HARDWARE[max(found, key=len)] if found else HARDWARE["a100"]


def hardware_here(device: str | torch.device) -> Hardware:
    """Numbers of a GPU of this machine, with TF32 where PyTorch may use it; if it is unknown, those of the A100."""
    hardware = _nearest(torch.cuda.get_device_name(device))
    return hardware.with_tf32() if may_round_to_tf32(torch.float32) else hardware
