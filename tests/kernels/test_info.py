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
from mpoe_kernels.native_library import INFO_KEYS, NATIVE_LIBRARY
from mpoe_kernels.triton import architecture


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


def test_command_as_json_and_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    info.main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["mpoe"] == info.__version__
    assert set(facts["backends"]) == set(backend_reasons())
    monkeypatch.setattr(architecture, "triton_installed", lambda: False)
    architecture.triton_reasons.cache_clear()
    info.main([])
    architecture.triton_reasons.cache_clear()
    text = capsys.readouterr().out
    assert facts["mpoe"] in text
    answer, reason = text[text.index("  triton          ", text.index("kernel backends")) :].splitlines()[:2]
    assert answer.endswith("no")
    assert "triton" in reason.lower()


def test_without_a_library_it_is_said_why_and_the_rest_is_told(tmp_path: Path) -> None:
    """A copy of the package without compiled kernels."""
    package = Path(info.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / package.name / "_native_missing.txt").write_text("no compiler was found\n")
    command = [sys.executable, "-m", "mpoe_kernels.info"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "  native          no\n                  it was not built: no compiler was found\n" in done.stdout
