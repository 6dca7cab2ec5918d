"""Builds the native kernels with CMake where that is possible; the metadata is in pyproject.toml.

The environment variable ``MPOE_BUILD`` decides: ``auto`` (default: build the CPU kernels if a
compiler and CMake are there, else install without and say so), ``cpu`` (those, or fail), ``cuda``
(the CUDA kernels too, or fail), ``none``. The CPU kernels need nothing of torch, so pip may build
them in isolation, for the Python that runs it; the CUDA kernels are built against the torch of this
Python, so they need ``pip install --no-build-isolation``. ``TORCH_CUDA_ARCH_LIST``
("8.0;9.0a;10.0+PTX") names the GPUs to compile for, ``CUDACXX`` the CUDA compiler. ``CMAKE_ARGS``
is passed on; ``CMAKE_BUILD_PARALLEL_LEVEL`` limits the compilers that run at once.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "mpoe_kernels"
OLDEST_TORCH = (2, 11)
OLDEST_SETUPTOOLS = (
    77  # as in pyproject.toml, whose build requirements pip installs in isolation alone
)
CHOICES = ("auto", "cpu", "cuda", "none")
ON_REQUEST = (
    "the CUDA kernels are built on request: MPOE_BUILD=cuda pip install --no-build-isolation ."
)


class Module(NamedTuple):
    """A compiled library: its CMake target, and the file with the reason where there is none.

    The loaders quote the reason: mpoe_kernels/{native,cuda}_library.py.
    """

    target: str
    reason_file: str
    suffix: str

    @property
    def library(self) -> str:
        return self.target + self.suffix


NATIVE = Module("_C", "_native_missing.txt", sysconfig.get_config_var("EXT_SUFFIX"))
CUDA = Module("_C_cuda", "_cuda_missing.txt", ".abi3.so")


def folder_of(package: str) -> Path | None:
    """Folder of an installed package, without importing it (torch takes seconds)."""
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec else None
    return Path(locations[0]) if locations else None


def program(name: str) -> str | None:
    """A program on PATH or beside the interpreter (where pip puts cmake and ninja)."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def compiler() -> str | None:
    named = os.environ.get("CXX")
    if named:
        return shutil.which(shlex.split(named)[0])
    return next(filter(None, map(program, ("c++", "g++", "clang++"))), None)


def nvcc() -> str | None:
    """The CUDA compiler: ``CUDACXX``, on PATH, or where the toolkit usually is."""
    named = os.environ.get("CUDACXX")
    return (
        shutil.which(named)
        if named
        else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    )


def cmake_architectures(listed: str) -> str:
    """``TORCH_CUDA_ARCH_LIST`` in CMake's words: ``"8.0;9.0a+PTX"`` becomes
    ``"80-real;90a-real;90a-virtual"``."""
    names = []
    for word in listed.replace(",", " ").replace(";", " ").split():
        number, plus, kind = word.partition("+")
        if not re.fullmatch(r"\d+\.\d[af]?", number) or (plus and kind != "PTX"):
            raise SystemExit(
                "TORCH_CUDA_ARCH_LIST must name architectures like 8.0, 9.0a or 10.0+PTX; got "
                f"{word!r}"
            )
        number = number.replace(".", "")
        names += [f"{number}-real", *([f"{number}-virtual"] if plus else [])]
    return ";".join(names)


def obstacle() -> str | None:
    """Why no kernels can be built here; None: those for CPUs can."""
    if not sys.platform.startswith(("linux", "darwin")):
        return f"native kernels are built on Linux and macOS only, this is {sys.platform}"
    if compiler() is None:
        return f"no C++ compiler was found ({os.environ.get('CXX') or 'c++, g++, clang++'})"
    if program("cmake") is None:
        return "CMake was not found"
    if folder_of("pybind11") is None:
        return "pybind11 was not found: pip install pybind11"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        folder = sysconfig.get_path("include")
        return f"Python's headers were not found in {folder} (Debian's python3-dev)"
    return None


def cuda_obstacle() -> str | None:
    """Why no CUDA kernels can be built where those for CPUs can."""
    if nvcc() is None:
        return (
            f"nvcc was not found ({os.environ.get('CUDACXX') or 'CUDACXX, PATH, /usr/local/cuda'})"
        )
    if folder_of("torch") is None:
        return (
            "the CUDA kernels are built against torch, which was not importable (pip builds in "
            "isolation by default): "
            'install torch >= 2.11, "setuptools>=77", cmake and ninja first, then use pip install '
            "--no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
        return f"the CUDA kernels need torch >= 2.11 to build, found {version}"
    return None


def decide() -> dict[Module, str]:
    """The libraries that are not built, with the reason."""
    choice = os.environ.get("MPOE_BUILD", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"MPOE_BUILD must be one of {', '.join(CHOICES)}; got {choice!r}")
    if choice == "none":
        return dict.fromkeys((NATIVE, CUDA), "MPOE_BUILD=none was set when the package was built")
    reason = obstacle() or (cuda_obstacle() if choice == "cuda" else None)
    if reason and choice != "auto":
        raise SystemExit(f"MPOE_BUILD={choice}: {reason}")
    if choice == "cuda":
        return {}
    return {CUDA: ON_REQUEST} | ({NATIVE: reason} if reason else {})


def publish(source: Path | str, target: Path) -> None:
    """Copy a file, or write a text, in one step: other processes may be loading the old one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    if isinstance(source, Path):
        shutil.copy2(source, part)
    else:
        part.write_text(source)
    os.replace(part, target)


def record_missing(module: Module, reason: str, folder: Path) -> None:
    if module is NATIVE:
        tell(f"native kernels are not built, the eager backend will be used: {reason}")
    publish(reason + "\n", folder / module.reason_file)


def tell(message: str) -> None:
    """A line that ``pip install -v`` shows at once."""
    print(f"mpoe: {message}", file=sys.stderr, flush=True)


def run_cmake(module: Module, folder: Path, version: str) -> Path:
    """Configure and build; the path of the library.

    Raises:
        subprocess.CalledProcessError: CMake or the compiler failed; their messages are on standard
            output.
    """
    cmake, ninja = program("cmake"), program("ninja")
    assert cmake is not None
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [
        *(("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}") if ninja else ()),
        f"-DMPOE_VERSION={version}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={folder_of('pybind11')}/share/cmake/pybind11",
    ]
    if module is CUDA:
        arguments += [
            "-DMPOE_CUDA=ON",
            f"-DCMAKE_CUDA_COMPILER={nvcc()}",
            f"-DMPOE_TORCH_DIR={folder_of('torch')}",
        ]
        arguments.append(f"-DMPOE_TORCH_VERSION={importlib.metadata.version('torch')}")
        if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={cmake_architectures(listed)}")
    arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    started = time.monotonic()
    tell(f"building {module.library} with {compiler()}")
    subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), *arguments], check=True)
    # Without Ninja, CMake's generator of makefiles runs one compiler at a time unless told.
    jobs = (
        []
        if ninja or "CMAKE_BUILD_PARALLEL_LEVEL" in os.environ
        else ["--parallel", str(os.cpu_count() or 1)]
    )
    subprocess.run([cmake, "--build", str(folder), "--target", module.target, *jobs], check=True)
    tell(f"{module.library} took {time.monotonic() - started:.0f} s")
    return folder / module.library


class BuildNative(build_ext):
    """Runs CMake instead of compiling sources itself."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        target = (ROOT if in_place else Path(self.build_lib)) / PACKAGE
        for module in (NATIVE, CUDA):
            reason = MISSING.get(module) or self.build_module(module, target)
            if reason:
                record_missing(module, reason, target)

    def build_module(self, module: Module, target: Path) -> str | None:
        """Build and publish; why that failed, where the install may go on without."""
        try:
            library = run_cmake(
                module, Path(self.build_temp) / module.target, self.distribution.get_version()
            )
        except subprocess.CalledProcessError as error:
            step = "compiling" if "--build" in error.cmd else "configuring"
            reason = f"{step} them failed; pip install -v shows the messages"
            choice = os.environ.get("MPOE_BUILD", "auto")
            if choice != "auto":
                raise SystemExit(f"MPOE_BUILD={choice}: {reason}") from None
            return reason
        publish(library, target / module.library)
        (target / module.reason_file).unlink(missing_ok=True)
        return None

    def get_outputs(self) -> list[str]:
        built = [Path(self.build_lib) / PACKAGE / module.library for module in (NATIVE, CUDA)]
        return [str(path) for path in built if path.is_file()]


class BuildPython(build_py):
    """Leaves the reasons where nothing is built; else `BuildNative` does."""

    def run(self) -> None:
        super().run()
        if NATIVE in MISSING:
            for module, reason in MISSING.items():
                record_missing(
                    module, reason, (ROOT if self.editable_mode else Path(self.build_lib)) / PACKAGE
                )


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"building mpoe needs setuptools >= {OLDEST_SETUPTOOLS}, found {setuptools.__version__}: "
        "run pip install --upgrade setuptools"
    )
MISSING = decide()
setup(
    ext_modules=[] if NATIVE in MISSING else [Extension(f"{PACKAGE}._C", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
