"""Compiles every GPU kernel that ships, ahead of time and without a GPU, and checks the machine
code.

No kernel may spill registers, use more shared memory than the architecture has, or multiply
matrices without tensor-core instructions; no program of Triton's may wait for another one, and nvcc
may not warn. Triton's kernels are compiled in every configuration that tools/shipped_kernels.py
launches, csrc/cuda's files by nvcc (``CUDACXX``, PATH or /usr/local/cuda/bin).
"""

import argparse
import importlib
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import shipped_kernels as shipped
import torch
import triton
from machine_code import Binary, disassembled, find, of_amd
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mpoe_kernels.testing.launches import Launch

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-lineinfo",
    "--Werror",
    "all-warnings",
    "-Xcompiler",
    "-Wall,-Wextra",
    "-Xptxas",
    "-warn-spills,-warn-lmem-usage",
    f"-I{CSRC}",
]
_DOT = re.compile(r"tt\.dot(?:_scaled)? (.*)$", re.MULTILINE)
# What a program could wait for another by, or count with it; shared memory is a program's own.
_BETWEEN_PROGRAMS = re.compile(
    r"\b(?:atom|red)(?:\.\w+)*\.global\S*|ld(?:\.\w+)*\.acquire\S*|(?:global|flat|buffer)_atomic_\w+"
)
# Parameters that are block sizes, not sizes of the problem.
BLOCK_SIZES = ("BM", "BN", "BK", "BT", "KL", "NL", "KR", "NR", "BLOCK", "PART", "CHUNK")
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class Job(NamedTuple):
    """A Triton kernel as specialised by a launch (two that compile to the same code are equal), or
    a CUDA source.

    Attributes:
        kernel: ``module:function``, or the source's path from the repository's root.
        architecture: key of `TARGETS`.
        signature: (parameter, Triton type or ``constexpr``) in order.
        constants: (parameter, value) of every constexpr.
        aligned: parameters that are multiples of 16.
        options: (name, value): ``num_warps``, ``num_stages``, ...
    """

    kernel: str
    architecture: str
    signature: tuple[tuple[str, str], ...] = ()
    constants: tuple[tuple[str, Any], ...] = ()
    aligned: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Name of the kernel's function, or the path."""
        return self.kernel.rpartition(":")[2]

    @property
    def configuration(self) -> str:
        """Block sizes, warps and pipeline stages, e.g. ``BM 64, BN 128, BK 64, num_stages 3,
        num_warps 4``."""
        shown = (*BLOCK_SIZES, "num_stages", "num_warps")
        words = [*self.constants, *self.options]
        return ", ".join(f"{name} {value}" for name, value in words if name in shown)


def job_of(launch: Launch, architecture: str) -> Job:
    """The specialisation that Triton would make for a launch.

    Raises:
        TypeError: an argument has a type that the kernels do not take.
    """
    function = launch.kernel
    given = dict(launch.arguments)
    signature = []
    constants = []
    aligned = []
    for parameter in function.params:
        name = parameter.name
        value = given.pop(name)
        kind, multiple = _type_of(parameter, value)
        signature.append((name, kind))
        if kind == "constexpr":
            constants.append((name, value))
        if multiple:
            aligned.append(name)
    return Job(
        f"{function.fn.__module__}:{function.fn.__name__}",
        architecture,
        tuple(signature),
        tuple(constants),
        tuple(aligned),
        tuple(sorted(given.items())),
    )


def _type_of(parameter: Any, value: Any) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is known to be a multiple of 16."""
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        offset = int(value.storage_offset()) * value.element_size()
        return f"*{_TYPES[value.dtype]}", offset % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if not isinstance(value, int) or isinstance(value, bool):
        kind = type(value).__name__
        raise TypeError(f"{parameter.name} must be a tensor, an integer or a float; got {kind}")
    specialised = not parameter.do_not_specialize
    if value == 1 and specialised:
        return "constexpr", False
    return "i32" if abs(value) < 2**31 else "i64", value % 16 == 0 and specialised


@cache
def compiled(job: Job) -> dict[str, Binary]:
    """Its kernels by name; whatever the compiler raises is passed on.

    Raises:
        RuntimeError: Triton's interpreter has replaced the compiler in this process; a kernel's
            programs may wait for one another; there is no nvcc, or it fails, as it does over
            warnings and spills.
    """
    return {job.name: _by_triton(job)} if ":" in job.kernel else _by_nvcc(job)


def _by_triton(job: Job) -> Binary:
    module, _, name = job.kernel.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not isinstance(function, triton.runtime.jit.JITFunction):
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET=1")
    attributes = {}
    for name in job.aligned:
        place = function.arg_names.index(name)
        attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(function, dict(job.signature), dict(job.constants), attributes)
    built = triton.compile(source, target=TARGETS[job.architecture], options=dict(job.options))
    waits = _BETWEEN_PROGRAMS.findall(built.asm.get("ptx") or built.asm["amdgcn"])
    if waits:
        raise RuntimeError(f"programs may wait for one another: {', '.join(sorted(set(waits)))}")
    wants = any("16>" in line or "tf32" in line for line in _DOT.findall(built.asm["ttir"]))
    if "cubin" in built.asm:
        (binary,) = disassembled(built.asm["cubin"]).values()
    else:
        binary = of_amd(built.asm["amdgcn"])
    return binary._replace(
        shared=built.metadata.shared,
        tensor_memory=getattr(built.metadata, "tmem_size", None) or 0,
        wants_matrix=wants,
    )


def _by_nvcc(job: Job) -> dict[str, Binary]:
    nvcc = os.environ.get("CUDACXX") or find("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc was not found: set CUDACXX or add it to PATH")
    architecture = job.architecture.replace("sm_90", "sm_90a")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "built.cubin"
        command = [nvcc, *NVCC_FLAGS, "-cubin", f"-arch={architecture}", ROOT / job.kernel]
        done = subprocess.run([*command, "-o", built], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed\n{done.stdout}{done.stderr}")
        return disassembled(built.read_bytes())


def sources(architectures: Iterable[str]) -> list[Job]:
    """All files of csrc/cuda."""
    names = [path.relative_to(ROOT).as_posix() for path in sorted(CSRC.glob("cuda/*/*.cu"))]
    nvidia = [name for name in architectures if TARGETS[name].backend == "cuda"]
    return [Job(name, architecture) for architecture, name in product(nvidia, names)]


def _difficulty(job: Job) -> tuple[int, int, int]:
    """Tile size, number of extras, variety of sizes and strides: the most difficult job is the
    likeliest to spill."""
    constants = dict(job.constants)
    values = list(constants.values())
    extras = sum((value is True) - (value is None) for value in values)
    tile = math.prod(value for name, value in constants.items() if name in BLOCK_SIZES)
    return tile, extras, len(set(tree_leaves(values)))


def shipped_jobs(
    architectures: Iterable[str],
    dtypes: Iterable[str] = tuple(shipped.DTYPES),
    quick: bool = False,
    sizes: Iterable[shipped.Sizes] = (shipped.T5_BASE, *shipped.LARGE_SIZES),
) -> dict[Job, str]:
    """The most difficult job for every kernel, architecture, dtype and configuration, with a
    problem that launches it.

    Of sizes other than T5-base's, the most difficult one of all configurations together; with
    ``quick``, of T5-base's sizes in bfloat16 and all configurations together.
    """
    if quick:
        dtypes = ("bfloat16",)
        sizes = (shipped.T5_BASE,)
    hardest: dict[tuple[Any, ...], Job] = {}
    uses = {}
    for size, dtype in product(sizes, dtypes):
        for problem in shipped.problems(shipped.DTYPES[dtype], quick, size):
            where = f"{problem.name}, {dtype}, d={size.model}"
            for architecture in architectures:
                for launch in problem.launches(architecture):
                    job = job_of(launch, architecture)
                    kind = job.configuration if size.every_tile else size
                    group = (job.name, architecture, dtype, kind)
                    if quick:
                        group = group[:2]
                    uses.setdefault(job, where)
                    before = hardest.get(group, job)
                    hardest[group] = max(before, job, key=_difficulty)
    return {job: uses[job] for job in hardest.values()}


def problems_of(job: Job) -> list[str]:
    """Why it must not be shipped; what the compiler raises is one of the reasons."""
    try:
        binaries = compiled.__wrapped__(job)  # the code of thousands is not kept
    # A compiler fails in many ways; the other jobs still run, and all are reported.
    except Exception as error:
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"]
    several = len(binaries) > 1
    return [
        f"{name}: {problem}" if several else problem
        for name, binary in binaries.items()
        for problem in binary.problems(job.architecture)
    ]


def main(words: list[str] | None = None) -> int:
    """Returns 1 if a kernel must not be shipped."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = ("triton", "cuda")
    parser.add_argument("kinds", nargs="*", choices=kinds, help="default both")
    parser.add_argument(
        "--quick", action="store_true", help="one configuration of every Triton kernel"
    )
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=TARGETS, help="default all")
    parser.add_argument("--only", default="", help="only kernels or files whose name contains this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    chosen = parser.parse_args(words)
    uses = {}
    kinds = chosen.kinds or kinds
    if "triton" in kinds:
        uses |= shipped_jobs(chosen.arch, quick=chosen.quick)
    if "cuda" in kinds:
        uses |= dict.fromkeys(sources(chosen.arch), "csrc")
    jobs = [job for job in uses if chosen.only in job.name]
    wrong = 0
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) as pool:
        judged = zip(jobs, pool.map(problems_of, jobs), strict=True)
        for job, problems in tqdm(judged, total=len(jobs), unit="kernel"):
            for problem in problems:
                where = f"{job.name} {job.configuration} on {job.architecture} ({uses[job]})"
                print(f"{where}: {problem}", file=sys.stderr)
            wrong += len(problems)
    names = {job.name for job in jobs}
    print(f"{len(names)} kernels and files, {len(jobs)} configurations, {wrong} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
