"""Compiles the CUDA kernels for the CPU with the emulator of csrc/emu: `python tools/cuda_emulate.py [sanitizer]`.

Prints the path of the shared library, which tests load with ctypes. Results are kept in build/emulated, one folder for
each state of the sources, so a second call is free. Sanitizers: ``address`` (with undefined behaviour), ``thread``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "emulated"
SANITIZERS = {"": [], "address": ["-fsanitize=address,undefined"], "thread": ["-fsanitize=thread"]}
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
DEFINES = ["-DMPOE_CUDA_EMULATED", f"-I{ROOT / 'csrc'}"]
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
EMULATOR = ROOT / "csrc" / "emu" / "emulator.cpp"
LIBRARY = [*KERNELS, EMULATOR, ROOT / "csrc" / "emu" / "capi.cpp"]
PROBE = [EMULATOR, ROOT / "csrc" / "emu" / "probe_main.cpp"]
SWEEP = [*KERNELS, EMULATOR, ROOT / "csrc" / "emu" / "sweep_main.cpp"]


def compiler() -> str | None:
    """The C++ compiler: ``CXX``, or g++; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _state(words: Sequence[str]) -> str:
    """Hash of the command and of everything that csrc holds for it."""
    digest = hashlib.sha256("\0".join(words).encode())
    for folder in ("cuda", "emu", "common"):
        for path in sorted((ROOT / "csrc" / folder).iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def build(name: str, sources: Sequence[Path], sanitizer: str = "", defines: Sequence[str] = ()) -> Path:
    """Path of the shared library (``name`` ends in .so) or program, compiled unless it is there already.

    Args:
        name: file name of the result.
        sources: C++ or CUDA files.
        sanitizer: key of `SANITIZERS`.
        defines: further flags of the compiler.

    Raises:
        RuntimeError: no compiler, or the compiler's message.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler found; set CXX")
    flags = [*FLAGS, *DEFINES, *SANITIZERS[sanitizer], *defines]
    folder = CACHE / _state([cxx, name, *flags])
    target = folder / name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait for this one's result
        if target.exists():
            return target
        objects = []
        for source in sources:
            objects.append(str(folder / f"{source.stem}.o"))
            _run([cxx, *flags, "-x", "c++", "-c", str(source), "-o", objects[-1]])
        part = folder / f"{name}.part"
        shared = ["-shared"] if name.endswith(".so") else []
        _run([cxx, *flags, *shared, *objects, "-o", str(part)])
        os.replace(part, target)
        for path in objects:
            Path(path).unlink()
    return target


def library(sanitizer: str = "") -> Path:
    """The emulated kernels behind the interface of csrc/emu/capi.cpp."""
    return build("libmpoe_emulated.so", LIBRARY, sanitizer)


def main() -> int:
    if len(sys.argv) > 2 or any(word not in SANITIZERS for word in sys.argv[1:]):
        print(__doc__)
        return 64
    print(library(*sys.argv[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
