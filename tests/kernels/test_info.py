"""``python -m mpoe_kernels.info``: complete, quick, and clear about what is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpoe_kernels import backend_reasons, info
from mpoe_kernels.contract.kept import processor_name
from mpoe_kernels.native_library import INFO_KEYS, LIBRARY, NATIVE_LIBRARY

FORKS = """
import os, runpy, sys
import torch
for before, words in {calls}:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        exec(before)
        sys.argv = ["info", *words]
        runpy.run_module("mpoe_kernels.info", run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {{before}} {{words}}")
    print("{end}")
"""


def run_module(*calls: tuple[str, list[str]]) -> list[str]:
    """The command's outputs, one fork per (code to run first, arguments); torch is imported only once."""
    end = "=" * 20
    code = FORKS.format(calls=list(calls), end=end)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(f"{end}\n")[:-1]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[Path]]:
    """The output as JSON, as text, without Triton, and of copies without a native library, which lie in the folders."""
    package, folder = Path(info.__file__).parent, tmp_path_factory.mktemp("copies")
    folders = [folder / name for name in ("absent", "not_built", "broken")]
    for each in folders:
        ignored = shutil.ignore_patterns("*.so", "_native_missing.txt", "__pycache__")
        shutil.copytree(package, each / package.name, ignore=ignored)
    (folders[1] / package.name / "_native_missing.txt").write_text("no compiler was found\n")
    (folders[2] / package.name / LIBRARY).write_text("not a library")
    copies = [(f"sys.path.insert(0, {str(each)!r})", []) for each in folders]
    return run_module(("", ["--json"]), ("", []), ("sys.modules['triton'] = None", []), *copies), folders


def test_facts_are_those_of_this_process() -> None:
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["backends"] == backend_reasons()
    assert facts["torch_threads"] == torch.get_num_threads()
    assert facts["packages"]["torch"] == info.installed_version("torch")
    assert (facts["native"] is None) == bool(NATIVE_LIBRARY.reasons)
    assert facts["processor"] == processor_name()
    if facts["native"]:
        assert facts["native"].keys() >= INFO_KEYS
        assert facts["native"]["isa_used"] in facts["native"]["isa_compiled"].split()


def test_text_names_every_fact_and_every_reason() -> None:
    facts = info.collect(("torch", "no-such-package"))
    facts["backends"] = {"eager": [], "abacus": ["its beads are gone", "it has no frame"]}
    text = info.show(facts)
    for expected in (facts["mpoe"], facts["python"], torch.__version__.split("+")[0], "not installed", "cpu"):
        assert expected in text
    assert "  eager           yes\n  abacus          no\n" in text
    assert "its beads are gone" in text
    assert "it has no frame" in text


def test_where_choices_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = info.collect()
    assert facts["choices"] is None
    assert "by FLOPs alone (MPOE_AUTOTUNE=0)" in info.show(facts)
    monkeypatch.delenv("MPOE_AUTOTUNE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = info.collect()
    assert facts["choices"] == str(tmp_path / "mpoe" / "choices.json")
    assert facts["choices"] in info.show(facts)


def test_native_summary() -> None:
    built = {"compiler": "gcc 12", "torch": "any", "isa_compiled": "generic avx2 avx512", "isa_detected": "avx512"}
    assert info.native_summary(None).startswith("no")
    assert info.native_summary({**built, "isa_used": "avx512"}) == (
        "built by gcc 12 for any torch; instructions: avx512 found of generic, avx2, avx512 compiled"
    )
    assert info.native_summary({**built, "isa_used": "avx2"}).endswith("avx2 in use (MPOE_CPU_ISA)")


def test_command_as_json_and_text(outputs) -> None:
    as_json, text = outputs[0][:2]
    facts = json.loads(as_json)
    assert facts["mpoe"] == info.__version__
    assert set(facts["backends"]) == set(backend_reasons())
    assert facts["mpoe"] in text


def lines_of(backend: str, text: str) -> tuple[str, str]:
    """A backend's answer and first reason in the text."""
    text = text.partition("kernel backends")[2]
    answer, reason = text[text.index(f"  {backend} ") :].splitlines()[:2]
    return answer.split()[1], reason.strip()


def test_without_triton(outputs) -> None:
    answer, reason = lines_of("triton", outputs[0][2])
    assert answer == "no"
    assert "triton" in reason.lower()


def test_without_compiled_kernels(outputs) -> None:
    absent, not_built, broken = outputs[0][3:]
    answer, reason = lines_of("native", absent)
    assert answer == "no"
    assert reason.startswith(f"{LIBRARY} is not in")
    assert lines_of("native", not_built) == ("no", "it was not built: no compiler was found")
    answer, reason = lines_of("native", broken)
    assert answer == "no"
    assert reason.startswith(f"{outputs[1][2]}/")
