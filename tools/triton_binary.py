"""One Triton kernel compiled for one architecture, without a GPU, and what its machine code shows."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mpoe_kernels.testing.launches import Launch
from mpoe_kernels.triton.architecture import SHARED_MEMORY

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Matrix instructions. NVIDIA: warp (HMMA), warpgroup (HGMMA), fifth generation (UTC..MMA). AMD: mfma.
_MATRIX = {"cuda": re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b"), "hip": re.compile(r"\bv_(?:mfma|smfmac)_")}
_LOCAL = re.compile(r"\b(?:STL|LDL)\b")
_DOT = re.compile(r"tt\.dot(?:_scaled)? (.*)$", re.MULTILINE)
# Parameters that are block sizes, not sizes of the problem.
BLOCK_SIZES = ("BM", "BN", "BK", "BT", "KL", "NL", "KR", "NR", "BLOCK", "PART", "CHUNK")
_TENSOR_MEMORY_COLUMNS = 512  # on sm_100
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Job:
    """A kernel as specialised by a launch; two launches that compile to the same code make equal jobs.

    Attributes:
        kernel: ``module:function``.
        architecture: key of `TARGETS`.
        signature: (parameter, Triton type or ``constexpr``) in order.
        constants: (parameter, value) of every constexpr.
        aligned: parameters that are multiples of 16.
        options: (name, value): ``num_warps``, ``num_stages``, ...
    """

    kernel: str
    architecture: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """Name of the kernel's function."""
        return self.kernel.partition(":")[2]

    @property
    def elements(self) -> str:
        """``16-bit``, ``float32`` or, for kernels without floating-point numbers, ``-``."""
        kinds = {kind for _, kind in self.signature}
        return "16-bit" if kinds & {"*bf16", "*fp16"} else "float32" if "*fp32" in kinds else "-"

    @property
    def configuration(self) -> str:
        """Block sizes, warps and pipeline stages, e.g. ``BM 64, BN 128, BK 64, 4 warps, 3 stages``."""
        blocks = [f"{name} {value}" for name, value in self.constants if name in BLOCK_SIZES]
        options = dict(self.options)
        words = [f"{options['num_warps']} warps"] if "num_warps" in options else []
        words += [f"{options['num_stages']} stages"] if "num_stages" in options else []
        return ", ".join([*blocks, *words])


def job_of(launch: Launch, architecture: str) -> Job:
    """The specialisation that Triton would make for a launch.

    Raises:
        TypeError: an argument has a type that the kernels do not take.
    """
    function = launch.kernel
    given = dict(launch.arguments)
    signature, constants, aligned = [], [], []
    for parameter in function.params:
        name, value = parameter.name, given.pop(parameter.name)
        kind, multiple = ("constexpr", False) if parameter.is_constexpr else _type_of(name, value)
        signature.append((name, kind))
        if kind == "constexpr":
            constants.append((name, value))
        if multiple:
            aligned.append(name)
    where = f"{function.fn.__module__}:{function.fn.__name__}"
    return Job(where, architecture, tuple(signature), tuple(constants), tuple(aligned), tuple(sorted(given.items())))


def _type_of(name: str, value: Any) -> tuple[str, bool]:
    """Triton's type of a run-time argument, and whether it is known to be a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}", value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return ("constexpr", False) if value == 1 else ("i32" if abs(value) < 2**31 else "i64", value % 16 == 0)
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"{name} must be a tensor, an integer or a float; got {type(value).__name__}")


@dataclass(frozen=True)
class Binary:
    """What the machine code of a kernel shows.

    Attributes:
        registers: registers per thread.
        spills: instructions (NVIDIA) or registers (AMD) that go through local memory.
        stack: bytes of local memory per thread.
        shared: bytes of shared memory per program.
        tensor_memory: columns of tensor memory; sm_100 only.
        matrix_instructions: number of instructions for tensor or matrix cores.
        wants_matrix: whether it multiplies types that those cores take: 16-bit floats, or float32 as TF32.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    tensor_memory: int
    matrix_instructions: int
    wants_matrix: bool

    def problems(self, architecture: str) -> list[str]:
        """Reasons why it must not be shipped; empty if it may be."""
        found = []
        if self.spills or self.stack:
            found.append(f"spills: {self.spills} accesses, {self.stack} bytes of local memory")
        limit = SHARED_MEMORY[architecture]
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory; {architecture} has {limit}")
        if self.tensor_memory > _TENSOR_MEMORY_COLUMNS:
            found.append(f"needs {self.tensor_memory} columns of tensor memory; there are {_TENSOR_MEMORY_COLUMNS}")
        if self.wants_matrix and not self.matrix_instructions:
            found.append("multiplies matrices without a tensor-core instruction")
        return found


def _function_of(job: Job) -> triton.runtime.jit.JITFunction:
    """The job's kernel function.

    Raises:
        RuntimeError: Triton's interpreter has replaced the compiler in this process.
    """
    module, _, name = job.kernel.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not isinstance(function, triton.runtime.jit.JITFunction):
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET=1")
    return function


def identity(job: Job) -> str:
    """Everything that a job's machine code depends on: specialisation, source with its callees, Triton version."""
    return f"{job!r} {_function_of(job).cache_key} {triton.__version__}"


def compile_job(job: Job) -> Binary:
    """Compile the job; whatever the compiler raises is passed on.

    Raises:
        RuntimeError: Triton's interpreter has replaced the compiler in this process.
    """
    return _read(_built(job))


@cache
def machine_code(job: Job) -> str:
    """The job's instructions for an NVIDIA architecture, with the addresses of jumps."""
    return _dump(_built(job).asm["cubin"], "cuobjdump", "-sass")


def _built(job: Job) -> Any:
    function = _function_of(job)
    position = {parameter: index for index, parameter in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        dict(job.signature),
        {(position[parameter],): value for parameter, value in job.constants},
        {(position[parameter],): [["tt.divisibility", 16]] for parameter in job.aligned},
    )
    return triton.compile(source, target=TARGETS[job.architecture], options=dict(job.options))


def _read(built: Any) -> Binary:
    metadata = built.metadata
    if "cubin" in built.asm:
        usage, code = _disassemble(built.asm["cubin"])
        registers, stack = (int(_found(rf"\b{field}:(\d+)", usage)) for field in ("REG", "STACK"))
        spills, matrix = len(_LOCAL.findall(code)), _MATRIX["cuda"]
    else:
        code = built.asm["amdgcn"]
        # Scalar registers spill into vector registers, not into memory.
        registers, spills, stack = (
            int(_found(rf"\.{field}:\s+(\d+)", code))
            for field in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        matrix = _MATRIX["hip"]
    return Binary(
        registers,
        spills,
        stack,
        metadata.shared,
        getattr(metadata, "tmem_size", None) or 0,
        len(matrix.findall(code)),
        any("16>" in line or "tf32" in line for line in _DOT.findall(built.asm["ttir"])),
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the disassembler's output has no {pattern}")
    return match[1]


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code."""
    return _dump(cubin, "cuobjdump", "-res-usage"), _dump(cubin, "nvdisasm", "-c")


def _dump(cubin: bytes, program: str, option: str) -> str:
    """What one of the programs that come with Triton prints about a kernel."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([folder / program, option, file.name], capture_output=True, text=True, check=True).stdout
