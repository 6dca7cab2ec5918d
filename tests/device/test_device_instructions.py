"""On an NVIDIA GPU, the instructions that tests/emulator imitates give the emulator's results, bit
for bit."""

import os
import shutil
import subprocess

import pytest
import torch

from tests.emulator import cuda_emulate

SOURCE = cuda_emulate.EMULATION / "instructions_main.cu"


def results_of(program):
    """What a program prints: instruction -> words."""
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: words for name, *words in (line.split() for line in done.stdout.splitlines())}


def test_instructions_are_as_emulated(device, tmp_path):
    """mma.sync, ldmatrix, cp.async, roundings, shuffles and votes."""
    if device.type != "cuda":
        pytest.skip("a CPU has no such instructions")
    nvcc = (
        os.environ.get("CUDACXX")
        or shutil.which("nvcc")
        or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )
    if nvcc is None or cuda_emulate.compiler() is None:
        pytest.skip("nvcc and a C++ compiler are needed")
    emulated = results_of(cuda_emulate.build("instructions", [cuda_emulate.EMULATOR, SOURCE]))
    major, minor = torch.cuda.get_device_capability(device)
    architecture, program = f"sm_{major}{minor}{'a' * (major == 9)}", tmp_path / "instructions"
    flags = ["-std=c++20", "-O3", f"-I{cuda_emulate.CSRC}", f"-arch={architecture}"]
    done = subprocess.run(
        [nvcc, *flags, str(SOURCE), "-o", str(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert emulated
    assert results_of(program) == emulated
