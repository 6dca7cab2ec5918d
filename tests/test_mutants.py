"""The tool that plants bugs tells what the tests see from what they do not, and its table names files that exist."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

mutants = pytest.importorskip("mutants", reason="needs cosmic-ray, of the extra mutation")

ROOT = Path(__file__).resolve().parents[1]
CODE = """
def below(value: int | None, limit: int) -> bool:
    return value < limit


def unseen(value: int, limit: int) -> bool:
    return value < limit
"""
TEST = """
from comparisons import below, unseen

def test_below():
    assert [below(value, 3) for value in (1, 3, 4)] == [True, False, False]
    unseen(1, 3)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "comparisons.py").write_text(CODE)
    (tmp_path / "test_comparisons.py").write_text(TEST)
    (tmp_path / "tools").mkdir()
    (tmp_path / "others.py").write_text("def other(value: int) -> int:\n    return value + 1\n")
    (tmp_path / "test_others.py").write_text(
        "from others import other\n\ndef test_other():\n    assert [other(1), other(5)] == [2, 6]\n"
    )
    (tmp_path / "tools" / "mutants.toml").write_text(
        '[comparisons]\nfiles = ["comparisons.py"]\ntests = ["test_comparisons.py"]\n'
        '[others]\nfiles = ["others.py"]\ntests = ["test_others.py"]\n'
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    return tmp_path


def test_seen_and_unseen(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mutants.main(["--root", str(project), "--count", "6"]) == 1
    outcomes = json.loads((project / "build" / "mutants.json").read_text())
    assert len(outcomes) == 6
    assert not any("int | None" in name.split(" -> ")[0] for name in outcomes)  # annotations do nothing
    for name, outcome in outcomes.items():
        assert outcome == ("passed" if ":unseen:" in name else "failed"), name
    survived = [line for line in capsys.readouterr().out.splitlines() if line.startswith("survived")]
    assert len(survived) == sum(outcome == "passed" for outcome in outcomes.values()) > 0
    table = project / "tools" / "mutants.toml"
    known = "".join(f"{json.dumps(line.removeprefix('survived: '))} = 'nothing looks at it'\n" for line in survived)
    table.write_text(table.read_text() + "[comparisons.survivors]\n" + known)
    assert mutants.main(["--root", str(project), "--count", "6"]) == 0  # from the results, without another run
    assert (project / "comparisons.py").read_text() == CODE


def test_tests_that_fail_without_a_mutation_are_told(project: Path) -> None:
    (project / "test_comparisons.py").write_text(TEST + "    assert False\n")
    with pytest.raises(SystemExit, match="the tests of area comparisons must pass without a mutation"):
        mutants.main(["--root", str(project), "--count", "1"])


def test_the_table_names_files_and_tests() -> None:
    for area in mutants.read_areas(ROOT / "tools" / "mutants.toml"):
        assert all(list(ROOT.glob(each)) for each in area.files), area.name
        assert all((ROOT / each).exists() for each in area.tests), area.name
