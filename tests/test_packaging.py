"""Source distribution, wheels and installs: with a compiler, without, and told what to do. Slow:
they compile."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from mpoe_kernels.compiled import BUILD_COMMAND
from mpoe_kernels.native_library import LIBRARY
from tests.cases import ROOT

pytestmark = pytest.mark.slow
OFFLINE = "--no-deps --no-build-isolation --no-index"
HAS_COMPILER = shutil.which("c++") is not None and shutil.which("cmake") is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler and CMake")


def run(*command, cwd, **environment):
    """Run with the environment of this process, without its PYTHONPATH and nvcc; output and errors
    together."""
    base = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "MPOE_BUILD", "CXX")
    }
    base["CUDACXX"] = "absent"  # no test builds the CUDA kernels, which take minutes
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**base, "CMAKE_BUILD_PARALLEL_LEVEL": "2", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def done(*command, cwd, **environment):
    answer = run(*command, cwd=cwd, **environment)
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy of the source tree without build products."""
    folder = tmp_path_factory.mktemp("sdist")
    listing = subprocess.run(
        "git ls-files -z --cached --others --exclude-standard".split(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    if not listing:
        pytest.skip("needs the source checkout")
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "tree" / name)
    done(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture
def source(sdist, tmp_path):
    """The unpacked source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    return folder


def environment(folder, packages=()):
    """A new virtual environment that sees this one's packages: all others, or only those named; its
    Python."""
    done(
        sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent
    )  # pip is one of the packages
    (site,) = (folder / "lib").glob("python*/site-packages")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        # An installed mpoe would be taken for the one under test.
        is_wanted = (
            path.name.startswith(("pip", *packages))
            if packages
            else not path.name.startswith(("mpoe", "__editable__"))
        )
        if is_wanted and path.suffix != ".pth" and not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    return folder / "bin/python"


def without_compiler(folder):
    """A PATH with no compiler on it."""
    folder.mkdir()
    for name in ("cmake", "ninja", "git"):
        found = shutil.which(name)
        if found:
            (folder / name).symlink_to(found)
    return str(folder)


def install(python, source, *options, **variables):
    words = [*f"-m pip install -v {OFFLINE}".split(), *options, source]
    return done(python, *words, cwd=source.parent, **variables)


def facts_of(python, cwd):
    return json.loads(done(python, "-m", "mpoe_kernels.info", "--json", cwd=cwd))


def complaints_of_pip(python, cwd):
    """What ``pip check`` says of our package: requirements that are absent or too old."""
    lines = run(python, "-m", "pip", "check", cwd=cwd).stdout.splitlines()
    return [line for line in lines if line.startswith("mpoe ")]


def wheel_of(python, source, folder):
    """A wheel, and what pip said."""
    words = f"-m pip wheel -v {OFFLINE} -w {folder} {source}".split()
    output = done(python, *words, cwd=source.parent)
    (wheel,) = folder.glob("*.whl")
    return wheel, output


def keep_little(source):
    """Leave csrc only what is needed to load, to tell of itself and to route: built in seconds."""
    module = source / "csrc/bindings" / "module.cpp"
    for path in [*module.parent.glob("*.cpp"), *(source / "csrc/cpu").glob("*/*.cpp")]:
        if (
            path.name not in ("module.cpp", "threads.cpp", "routing.cpp")
            and path.parent.name != "routing"
        ):
            path.unlink()
    bound = r"^  mpoe::bind_(?!threads|routing)\w+\(module\);\n"
    module.write_text(re.sub(bound, "", module.read_text(), flags=re.MULTILINE))


def test_the_lowest_versions_are_those_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["report"], *extras["train"]]
    lines = (ROOT / "tools/lowest_versions.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if "==" in line)
    declared = dict(
        requirement.partition(";")[0].split(">=") for requirement in listed if ">=" in requirement
    )
    assert lowest.keys() == declared.keys()
    for name, version in declared.items():
        assert f"{lowest[name]}.".startswith(f"{version}."), name


def test_source_distribution_is_complete_and_clean(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "mpoe", "mpoe_kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    wanted = {name for name in tracked if (ROOT / name).is_file()}
    assert wanted - names == set()
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert [name for name in names if name.endswith((".so", "_missing.txt", ".pyc"))] == []


# What build isolation gives, with what pyproject.toml asks for from where this environment has it.
BUILD_REQUIREMENTS = (
    """setuptools _distutils_hack pkg_resources wheel cmake ninja pybind11""".split()
)


@needs_compiler
def test_with_a_compiler_the_wheel_is_native_whatever_torch_there_is(source, tmp_path):
    """Built without torch, for this Python; installed, it computes what eager does; `.ci/run`
    builds all kernels so."""
    keep_little(source)
    builder = environment(tmp_path / "builder", packages=BUILD_REQUIREMENTS)
    assert run(builder, "-c", "import torch", cwd=tmp_path).returncode != 0
    wheel, output = wheel_of(builder, source, tmp_path / "wheels")
    lines = [line.strip() for line in output.splitlines()]
    (first,) = (
        k for k, line in enumerate(lines) if line.startswith(f"mpoe: building {LIBRARY} with ")
    )
    (last,) = (
        k
        for k, line in enumerate(lines)
        if re.fullmatch(rf"mpoe: {re.escape(LIBRARY)} took \d+ s", line)
    )
    assert any("Building CXX object" in line for line in lines[first:last]), "progress is told"
    python_tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.search(rf"-{python_tag}-{python_tag}t?-(linux|macosx)", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [n for n in names if n.endswith(".so")] == [f"mpoe_kernels/{LIBRARY}"]
    assert [
        n for n in names if n.endswith("_native_missing.txt") or n.startswith(("tests/", "csrc/"))
    ] == []
    assert {f"mpoe/data/standard/{name}.yaml" for name in ("glue", "others", "local")} <= set(names)

    python = environment(tmp_path / "user")
    done(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    facts = facts_of(python, tmp_path)
    assert facts["backends"]["native"] == []
    assert facts["native"]["path"].startswith(str(tmp_path))
    assert facts["cuda"] is None
    assert "MPOE_BUILD=cuda pip install --no-build-isolation ." in facts["backends"]["cuda"][0]
    code = (
        "import torch; from mpoe_kernels import combine, dispatch, route\n"
        "index, x = torch.randint(0, 3, (9, 2)), torch.randn(9, 5)\n"
        "def run(b):\n"
        "    r = route(index, 3, backend=b)\n"
        "    return combine(dispatch(x, r, backend=b), r, torch.ones(9, 2), backend=b)\n"
        "assert torch.equal(run('native'), run('eager'))\n"
    )
    done(python, "-c", code, cwd=tmp_path)


def test_without_compiler_the_install_is_eager_and_says_so(source, tmp_path):
    python = environment(tmp_path / "user")
    output = install(python, source, PATH=without_compiler(tmp_path / "path"))
    reason = "no C++ compiler was found (c++, g++, clang++)"
    lines = [line.strip() for line in output.splitlines() if line.strip().startswith("mpoe: ")]
    assert lines == [
        f"mpoe: native kernels are not built, the eager backend will be used: {reason}"
    ]
    facts = facts_of(python, tmp_path)
    assert facts["native"] is None
    assert facts["backends"]["native"] == [f"it was not built: {reason}"]
    assert facts["backends"]["eager"] == []
    assert complaints_of_pip(python, tmp_path) == []
    (record,) = python.parents[1].glob("lib/python*/site-packages/tqdm-*")
    record.unlink()  # a link, see `environment`
    assert len(complaints_of_pip(python, tmp_path)) == 1


def test_without_what_binds_the_kernels_the_install_says_so(source, tmp_path):
    python = environment(
        tmp_path / "isolated", packages=tuple(set(BUILD_REQUIREMENTS) - {"pybind11"})
    )
    answer = run(python, "setup.py", "--version", cwd=source, MPOE_BUILD="cpu", CXX=sys.executable)
    assert answer.returncode != 0
    assert "MPOE_BUILD=cpu: pybind11 was not found: pip install pybind11" in answer.stdout


@needs_compiler
def test_the_cuda_kernels_ask_for_the_torch_of_the_environment(source, tmp_path):
    python = environment(tmp_path / "isolated", packages=BUILD_REQUIREMENTS)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    answer = run(python, "setup.py", "--version", cwd=source, MPOE_BUILD="cuda", CUDACXX=str(nvcc))
    assert answer.returncode != 0
    assert (
        "MPOE_BUILD=cuda: the CUDA kernels are built against torch, which was not importable"
        in answer.stdout
    )
    assert "pip install --no-build-isolation" in answer.stdout


@needs_compiler
def test_a_failing_compiler_leaves_an_eager_install(source, tmp_path):
    python = environment(tmp_path / "user")
    keep_little(source)
    (source / "csrc/bindings" / "module.cpp").write_text("#error planted\n")
    output = install(python, source)
    assert "planted" in output
    assert facts_of(python, tmp_path)["backends"]["native"] == [
        "it was not built: compiling them failed; pip install -v shows the messages"
    ]
    answer = run(python, "setup.py", "build", cwd=source, MPOE_BUILD="cpu")
    assert answer.returncode != 0
    assert "MPOE_BUILD=cpu: compiling them failed" in answer.stdout


def test_the_variable_decides(source, tmp_path):
    python, path = environment(tmp_path / "user"), without_compiler(tmp_path / "path")
    for value, message in (
        ("gpu", "MPOE_BUILD must be one of auto, cpu, cuda, none; got 'gpu'"),
        ("cpu", "MPOE_BUILD=cpu: no C++ compiler was found"),
    ):
        words = f"-m pip install {OFFLINE} {source}".split()
        answer = run(python, *words, cwd=tmp_path, MPOE_BUILD=value, PATH=path)
        assert answer.returncode != 0
        assert message in answer.stdout
        assert "Traceback" not in answer.stdout
    both = f"{path}:{os.environ['PATH']}"
    answer = run(python, "setup.py", "--version", cwd=source, MPOE_BUILD="cuda", PATH=both)
    assert "MPOE_BUILD=cuda: nvcc was not found (absent)" in answer.stdout
    install(python, source, MPOE_BUILD="none")
    reasons = facts_of(python, tmp_path)["backends"]["native"]
    assert reasons == ["it was not built: MPOE_BUILD=none was set when the package was built"]


@needs_compiler
def test_build_in_a_checkout(source, tmp_path):
    """An editable install without kernels says why; building in place afterwards takes the reason
    away."""
    package, python = source / "mpoe_kernels", environment(tmp_path / "user")
    keep_little(source)
    install(python, source, "-e", MPOE_BUILD="none")
    assert (package / "_native_missing.txt").is_file()
    assert facts_of(python, tmp_path)["native"] is None
    done(python, *BUILD_COMMAND.split()[1:], cwd=source, MPOE_BUILD="cpu")
    assert not (package / "_native_missing.txt").exists()
    assert facts_of(python, tmp_path)["native"]["path"] == str(package / LIBRARY)


@pytest.mark.parametrize(
    "listed, architectures",
    [
        ("8.0;9.0a;10.0+PTX", "80-real;90a-real;100-real;100-virtual"),
        ("8.0 8.6", "80-real;86-real"),
        ("Hopper", None),
        ("9.0+ptx", None),
    ],
)
def test_architectures_in_the_words_of_torch(listed, architectures):
    code = (
        "import setuptools; setuptools.setup = lambda **options: None\n"
        "names = {'__file__': 'setup.py', '__name__': 'setup'}; exec(open('setup.py').read(), "
        "names)\n"
        f"print(names['cmake_architectures']({listed!r}))"
    )
    answer = run(sys.executable, "-c", code, cwd=ROOT)
    if architectures:
        assert answer.stdout.splitlines()[-1] == architectures
    else:
        assert (
            "TORCH_CUDA_ARCH_LIST must name architectures like 8.0, 9.0a or 10.0+PTX; got"
            in answer.stdout
        )


def test_an_old_setuptools_is_named(source):
    code = (
        "import setuptools; setuptools.__version__ = '65.5.0'; exec(open('setup.py').read(), "
        "{'__file__': 'setup.py'})"
    )
    answer = run(sys.executable, "-c", code, cwd=source)
    assert answer.returncode != 0
    assert (
        "needs setuptools >= 77, found 65.5.0: run pip install --upgrade setuptools"
        in answer.stdout
    )
