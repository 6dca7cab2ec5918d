"""A buffer that scratch memory has no room for: debug builds and those of the sanitizers stop."""

import os
import shutil
import subprocess

import pytest

from tests.cases import ROOT

COMPILER = shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("flags", [["-O0"], ["-O1", "-fsanitize=address,undefined"], None])
def test_a_buffer_too_many(flags, tmp_path):
    """None: a release build, which does not look."""
    checked = ["-O3"] if flags is None else [*flags, "-DMPOE_CHECKS"]
    program = tmp_path / "scratch"
    source = ROOT / "tests/native" / "cpp/scratch_main.cpp"
    command = [str(COMPILER), "-std=c++20", *checked, "-I", str(ROOT / "csrc"), str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    # A preloaded library would come before the sanitizers' own.
    alone = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False, env=alone)
    if flags is None:
        assert ran.returncode == 3, ran.stderr
    else:
        assert ran.returncode not in (0, 2, 3), ran.stderr
        assert ran.stderr.startswith("scratch memory holds 48 floats; 64 are used"), ran.stderr


def test_builds_that_look():
    debug = (ROOT / "CMakeLists.txt").read_text()
    sanitized = (ROOT / "tests/native" / "cpp/CMakeLists.txt").read_text()
    assert "$<$<CONFIG:Debug>:MPOE_CHECKS>" in debug
    assert "target_compile_definitions(kernels PRIVATE MPOE_CHECKS)" in sanitized
