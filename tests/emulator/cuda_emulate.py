"""Compiles the CUDA kernels for the CPU: `python -m tests.emulator.cuda_emulate [sanitizer]`.

Prints the path of the shared library, which holds the ops ``torch.ops.mpoe_emulated`` and the
emulator's controls. Compiled files are kept in build/emulated under a hash of all their inputs, so
a second call compiles nothing. Sanitizers: ``address`` (with undefined behaviour), ``thread``.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TESTS = ROOT / "tests"
EMULATION = TESTS / "emulator"
CACHE = ROOT / "build/emulated"
SANITIZERS = {
    "": [],
    "address": ["-g1", "-fsanitize=address,undefined"],
    "thread": ["-g1", "-fsanitize=thread"],
}
FLAGS = "-std=c++20 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror".split()
DEFINES = ["-DMPOE_CUDA_EMULATED"]
CUDA = CSRC / "cuda"
KERNELS = sorted(CUDA.glob("*/*.cu"))
EMULATOR = EMULATION / "emulator.cpp"
HEADER = EMULATION / "cuda_emulator.h"  # as the device layer includes it
BINDINGS = EMULATION / "bindings.cpp"
LIBRARY = [*KERNELS, EMULATOR, EMULATION / "control.cpp", BINDINGS]
PROBE = [EMULATOR, EMULATION / "probe_main.cpp"]
# Programs that run kernels without Python; tests/native/cpp/truth.cpp computes the correct results.
_COMMON = [EMULATOR, CSRC / "common/cpu_features.cpp"]
SWEEPS = {
    "linear": [
        *(CUDA / "linear" / f"{name}.cu" for name in ("linear", "bfloat16", "float")),
        *(*_COMMON, TESTS / "native/cpp" / "truth.cpp", EMULATION / "sweep_linear.cpp"),
    ],
    "routing": [CUDA / "routing/routing.cu", *_COMMON, EMULATION / "sweep_routing.cpp"],
}


def compiler():
    """The C++ compiler: ``CXX``, or g++; None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _hash(words, files):
    digest = hashlib.sha256("\0".join(words).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _headers(source, folders):
    """What a source includes from its own folder or from ``folders`` (first match), directly and
    indirectly."""
    found = []
    waiting = [source]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            places = [folder / name for folder in (path.parent, *folders)]
            header = next((place.resolve() for place in places if place.is_file()), None)
            if header and header not in found:
                found.append(header)
                waiting.append(header)
    return sorted(found)


def _torch_flags():
    """Flags for torch's stable ABI headers; -O0, because parsing them takes too long for
    optimisation to pay off."""
    defines = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    return ["-O0", *defines, "-isystem", str(_torch() / "include")]


def _torch():
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the emulated ops need the package torch")
    return Path(spec.submodule_search_locations[0])


def _make(target, command):
    """Run ``command -o target`` unless the target exists; other processes wait for the one that
    runs it."""
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


def _precompiled(flags):
    """Flags that include `HEADER` first, precompiled once for all sources: it is a third of their
    compile time."""
    flags = [*flags, f"-I{CSRC}", f"-I{TESTS}"]
    folder = CACHE / "headers" / _hash(flags, [HEADER, *_headers(HEADER, [CSRC, TESTS])])
    own = folder / "own.h"
    if not own.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"own.h.{os.getpid()}"
        part.write_text(f'#include "{HEADER.relative_to(TESTS)}"\n')
        os.replace(part, own)
    _make(folder / "own.h.gch", [*flags, "-x", "c++-header", str(own)])
    return ["-include", str(own)]


def build(name, sources, sanitizer="", overlay=None):
    """Path of the shared library (``name`` ends in .so) or program, compiled if it does not exist
    yet.

    Args:
        name: file name of the result.
        sources: C++ or CUDA files.
        sanitizer: key of `SANITIZERS`.
        overlay: folder laid out like csrc; its files replace those in csrc.

    Raises:
        RuntimeError: no compiler, or the compiler's message.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler found; set CXX")
    folders = [*([] if overlay is None else [overlay]), CSRC, TESTS]
    plain = [cxx, *FLAGS, *DEFINES, *SANITIZERS[sanitizer]]
    base = [*plain, *(f"-I{folder}" for folder in folders)]
    objects, keys = [], []
    for source in sources:
        flags = [*base, *(_torch_flags() if source == BINDINGS else ())]
        if (
            overlay
            and source.is_relative_to(CSRC)
            and (overlay / source.relative_to(CSRC)).is_file()
        ):
            source = overlay / source.relative_to(CSRC)
        headers = _headers(source, folders)
        # A source that reads nothing from the overlay shares the plain build's object.
        changed = overlay is not None and any(
            path.is_relative_to(overlay) for path in (source, *headers)
        )
        used = (
            flags
            if changed
            else [flag for flag in flags if overlay is None or flag != f"-I{overlay}"]
        )
        keys.append(_hash(used, [source, *headers]))
        compiled = CACHE / "objects" / f"{source.stem}-{keys[-1]}.o"
        # torch's headers must come before the emulator's, whose keywords are macros.
        usual = (
            HEADER in headers
            and source != BINDINGS
            and not (overlay and (overlay / "emulator").exists())
        )
        usual = usual and len(sources) > len(
            PROBE
        )  # for two sources it costs as much time as it saves
        first = _precompiled(plain) if usual else []
        objects.append(str(_make(compiled, [*used, *first, "-x", "c++", "-c", str(source)])))
    target = CACHE / _hash([name, *keys], []) / name
    if not name.endswith(".so"):
        return _make(target, [*base, *objects])
    libraries = [f"-L{_torch() / 'lib'}", "-ltorch_cpu"] if BINDINGS in sources else []
    return _make(target, [*base, "-shared", *objects, *libraries])


def library(sanitizer=""):
    """The emulated kernels as torch ops, with the functions of tests/emulator/control.cpp."""
    return build("mpoe_emulated.so", LIBRARY, sanitizer)


def sweep(part, sanitizer="", overlay=None):
    """The program that runs and checks the kernels of one part (key of `SWEEPS`); see
    tests/emulator/sweep.h."""
    return build(f"sweep_{part}", SWEEPS[part], sanitizer, overlay)


def main():
    if len(sys.argv) > 2 or any(word not in SANITIZERS for word in sys.argv[1:]):
        print(__doc__)
        return 64
    print(library(*sys.argv[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
