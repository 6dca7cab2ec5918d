"""Builds the native kernels with CMake where that is possible; the metadata is in pyproject.toml.

The environment variable ``MPOE_BUILD`` decides: ``auto`` (default: build if a compiler, CMake and torch are there, else
install without and say so), ``cpu`` (build or fail), ``cuda`` (not yet), ``none``. torch comes from the running
interpreter, so a native build needs ``pip install --no-build-isolation``. ``CMAKE_ARGS`` is passed on;
``CMAKE_BUILD_PARALLEL_LEVEL`` limits the compilers that run at once.
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
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "mpoe_kernels"
LIBRARY = "_C.abi3.so"
# Written instead of the library; the loader quotes it (mpoe_kernels/backends/native/load.py).
REASON_FILE = "_native_missing.txt"
OLDEST_TORCH = (2, 11)
OLDEST_SETUPTOOLS = 77  # as in pyproject.toml, which pip does not check without build isolation
CHOICES = ("auto", "cpu", "cuda", "none")


def torch_folder() -> Path | None:
    """Folder of the torch package, without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("torch")
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


def obstacle() -> str | None:
    """Why the kernels cannot be built here; None: they can."""
    if not sys.platform.startswith(("linux", "darwin")):
        return f"native kernels are built on Linux and macOS only, this is {sys.platform}"
    if torch_folder() is None:
        return (
            "torch was not importable where the package was built (pip builds in isolation by default): "
            "install torch >= 2.11 first, then use pip install --no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
        return f"native kernels need torch >= 2.11 to build, found {version}"
    if compiler() is None:
        return f"no C++ compiler was found ({os.environ.get('CXX') or 'c++, g++, clang++'})"
    return None if program("cmake") else "CMake was not found"


def decide() -> str | None:
    """Reason for an install without native kernels; None: build them."""
    choice = os.environ.get("MPOE_BUILD", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"MPOE_BUILD must be one of {', '.join(CHOICES)}; got {choice!r}")
    if choice == "cuda":
        raise SystemExit("MPOE_BUILD=cuda: this version has no CUDA kernels yet; use auto, cpu or none")
    if choice == "none":
        return "MPOE_BUILD=none was set when the package was built"
    reason = obstacle()
    if reason and choice == "cpu":
        raise SystemExit(f"MPOE_BUILD=cpu: {reason}")
    return reason


def publish(source: Path | str, target: Path) -> None:
    """Copy a file, or write a text, in one step: other processes may be loading the old one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    if isinstance(source, Path):
        shutil.copy2(source, part)
    else:
        part.write_text(source)
    os.replace(part, target)


def record_missing(reason: str, folder: Path) -> None:
    print(f"mpoe: native kernels are not built, the eager backend will be used: {reason}", file=sys.stderr)
    publish(reason + "\n", folder / REASON_FILE)


def run_cmake(folder: Path, version: str) -> Path:
    """Configure and build; the path of the library.

    Raises:
        subprocess.CalledProcessError: CMake or the compiler failed; their messages are on standard output.
    """
    cmake, ninja = program("cmake"), program("ninja")
    assert cmake is not None
    folder.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    arguments = [
        *(f"-DMPOE_TORCH_DIR={torch_folder()}", f"-DMPOE_VERSION={version}"),
        f"-DMPOE_TORCH_VERSION={importlib.metadata.version('torch')}",
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), *generator, *arguments], check=True)
    subprocess.run([cmake, "--build", str(folder)], check=True)
    return folder / LIBRARY


class BuildNative(build_ext):
    """Runs CMake instead of compiling sources itself."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        target = (ROOT if in_place else Path(self.build_lib)) / PACKAGE
        try:
            library = run_cmake(Path(self.build_temp) / "native", self.distribution.get_version())
        except subprocess.CalledProcessError as error:
            step = "compiling" if "--build" in error.cmd else "configuring"
            reason = f"{step} them failed; pip install -v shows the messages"
            if os.environ.get("MPOE_BUILD") == "cpu":
                raise SystemExit(f"MPOE_BUILD=cpu: {reason}") from None
            record_missing(reason, target)
            return
        publish(library, target / LIBRARY)
        (target / REASON_FILE).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        built = Path(self.build_lib) / PACKAGE / LIBRARY
        return [str(built)] if built.is_file() else []


class BuildPython(build_py):
    """Leaves the reason where there is no native build."""

    def run(self) -> None:
        super().run()
        if MISSING is not None:
            record_missing(MISSING, (ROOT if self.editable_mode else Path(self.build_lib)) / PACKAGE)


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"building mpoe needs setuptools >= {OLDEST_SETUPTOOLS}, found {setuptools.__version__}: "
        "run pip install --upgrade setuptools"
    )
MISSING = decide()
setup(
    ext_modules=[] if MISSING else [Extension(f"{PACKAGE}._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    options={} if MISSING else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
