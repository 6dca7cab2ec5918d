"""Every header of the CPU kernels includes what it uses."""

import shutil
import subprocess

import pytest

from tests.cases import ROOT

COMPILER = shutil.which("c++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_a_header_compiles_alone():
    options = ["-std=c++20", "-fsyntax-only", "-I", str(ROOT / "csrc"), "-x", "c++"]
    headers = [path for folder in ("common", "cpu") for path in ROOT.glob(f"csrc/{folder}/**/*.h")]
    assert headers
    # One call: the compiler takes one after the other.
    compiled = subprocess.run(
        [str(COMPILER), *options, *map(str, headers)], capture_output=True, text=True, check=False
    )
    assert compiled.returncode == 0, compiled.stderr
