"""Compiles the CUDA kernels for the CPU with the emulator of csrc/emu: `python tools/cuda_emulate.py [sanitizer]`.

Prints the path of the shared library, which tests load with ctypes. What is compiled is kept in build/emulated by a
hash of everything that went into it, so a second call is free. Sanitizers: ``address`` (with undefined behaviour),
``thread``.
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


def _hash(words: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _headers() -> list[Path]:
    """Everything that a source may include."""
    folders = (ROOT / "csrc" / folder for folder in ("common", "cuda", "emu"))
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix in (".h", ".cuh"))


def _make(target: Path, command: Sequence[str]) -> Path:
    """Run ``command -o target`` unless the target is there; other processes wait for the one that does."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = target.with_name(f"{target.name}.part")
            done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            os.replace(part, target)
    return target


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
    headers = _headers()
    keys = {source: _hash([cxx, *flags], [source, *headers]) for source in sources}
    target = CACHE / _hash([name, *keys.values()], []) / name
    if target.exists():
        return target
    objects = [
        str(_make(CACHE / "objects" / f"{source.stem}-{key}.o", [cxx, *flags, "-x", "c++", "-c", str(source)]))
        for source, key in keys.items()
    ]
    shared = ["-shared"] if name.endswith(".so") else []
    return _make(target, [cxx, *flags, *shared, *objects])


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
