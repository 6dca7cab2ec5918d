"""The tool that plants bugs: which changes it makes, that it tells seen from unseen, and its table of functions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mutants
import pytest
from mutation_rules import mutants_of, resolve

ROOT = Path(__file__).resolve().parents[1]
PYTHON = '''
class Box:
    def size(self, values: list[int], limit: int = 3) -> int:
        """Text 1 < 2."""
        if len(values) < limit and not self.full:
            raise ValueError(f"at least {limit + 1}")
        self.seen = 5
        values.append(1)
        total = é = sum(values) * 2  # 1 + 1
        total += é + len(list(zip(values, values, strict=True)))
        return total if True else -1


def other() -> int:
    return 1 + 1
'''
CPP = """
int f(int a);
int f(int a) { // a + b
  const int b = a + 1;
  if (a < 2 && b == 0) return 0;
  b_ = g(a, "x + y");
  h(a);
  return b / 2;
}
"""


def changes(tmp_path: Path, name: str, text: str, function: str) -> list[tuple[str, str, str]]:
    (tmp_path / "mpoe").mkdir()
    (tmp_path / "mpoe" / name).write_text(text)
    return [(m.rule, m.before, m.after) for m in mutants_of(tmp_path, f"{name}:{function}")]


def test_rules_of_python(tmp_path: Path) -> None:
    assert changes(tmp_path, "box.py", PYTHON, "Box.size") == [
        ("constant", "3", "4"),
        ("comparison", "len(values) < limit", "(len(values) <= limit)"),
        ("operator", "len(values) < limit and not self.full", "(len(values) < limit or not self.full)"),
        ("operator", "not self.full", "(self.full)"),
        ("statement", "self.seen = 5", "pass"),
        ("constant", "5", "6"),
        ("statement", "values.append(1)", "pass"),
        ("constant", "1", "2"),
        ("operator", "sum(values) * 2", "(sum(values) + 2)"),
        ("constant", "2", "3"),
        ("statement", "total += é + len(list(zip(values, values, strict=True)))", "pass"),
        (
            "operator",
            "é + len(list(zip(values, values, strict=True)))",
            "(é - len(list(zip(values, values, strict=True))))",
        ),
        ("branch", "total if True else -1", "(-1 if True else total)"),
        ("constant", "True", "False"),
        ("operator", "-1", "(1)"),
        ("constant", "1", "2"),
    ]


def test_rules_of_cpp(tmp_path: Path) -> None:
    assert changes(tmp_path, "f.cpp", CPP, "f") == [
        ("operator", " + ", " - "),
        ("constant", "1", "2"),
        ("operator", " < ", " <= "),
        ("constant", "2", "3"),
        ("operator", " && ", " || "),
        ("operator", " == ", " != "),
        ("constant", "0", "1"),
        ("constant", "0", "1"),
        ("statement", 'b_ = g(a, "x + y");', ";"),
        ("statement", "h(a);", ";"),
        ("operator", " / ", " * "),
        ("constant", "2", "3"),
    ]


def test_targets_that_are_none(tmp_path: Path) -> None:
    changes(tmp_path, "box.py", PYTHON, "other")
    for target, message in (
        ("absent.py:f", "found 0 files"),
        ("box.py", "must name one file and a function"),
        ("box.py:Box.absent", "there is no absent"),
    ):
        with pytest.raises(ValueError, match=message):
            mutants_of(tmp_path, target)
    (tmp_path / "mpoe" / "wrong.cpp").write_text("int f(int a);")
    with pytest.raises(ValueError, match="there is no definition of f"):
        mutants_of(tmp_path, "wrong.cpp:f")


def test_the_table_has_enough_of_every_area() -> None:
    areas = mutants.read_areas(ROOT / "tools" / "mutants.toml")
    counts = {area.name: len(area.chosen(ROOT, mutants.PER_AREA)) for area in areas}
    assert len(counts) == 13
    assert min(counts.values()) >= 8
    assert sum(counts.values()) >= 100
    for area in areas:
        for target in area.functions:
            resolve(ROOT, target)
        assert [name for name in area.tests if not (ROOT / name).is_file()] == []
    first = mutants.sliced(areas, ROOT, 12)
    assert [m.name for _, m in first] == [m.name for _, m in mutants.sliced(areas, ROOT, 12)]
    assert len({area.name for area, _ in first}) == 12


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A function of two statements; the tests look at one."""
    root = tmp_path / "project"
    (root / "mpoe").mkdir(parents=True)
    (root / "bench").mkdir()
    (root / "mpoe" / "__init__.py").write_text("")
    (root / "mpoe" / "sums.py").write_text("def both(a, b, log):\n    log.append(a)\n    return a + b\n")
    (root / "mpoe" / "loop.py").write_text("def count(n):\n    k = 0\n    while k < n:\n        k += 1\n    return k\n")
    (root / "test_sums.py").write_text("from mpoe.sums import both\ndef test(): assert both(2, 3, []) == 5\n")
    (root / "table.toml").write_text('[sums]\nfunctions = ["sums.py:both"]\ntests = ["test_sums.py"]\n')
    (root / "equivalent.json").write_text("{}")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


def run(project: Path, *options: str) -> int:
    paths = ("--root", project, "--table", project / "table.toml", "--equivalent", project / "equivalent.json")
    return mutants.main([str(word) for word in (*paths, "--jobs", "1", "--import_first", *options)])


@pytest.mark.slow
def test_seen_and_unseen(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (project / "mpoe" / "sums.py").read_text()
    assert run(project) == 1, "a survivor without a reason"
    outcomes = json.loads((project / "build" / "mutants.json").read_text())
    assert {v["rule"]: v["outcome"] for v in outcomes.values()} == {"statement": "survived", "operator": "killed"}
    assert (project / "mpoe" / "sums.py").read_text() == before
    said = capsys.readouterr().out
    assert "survived: mpoe/sums.py:2 log.append(a)  ->  pass" in said
    assert said.splitlines()[-1].split() == ["all", "1", "0", "1", "0", "0"]
    # Kept results are not run again, and a reason settles a survivor.
    survivor = next(name for name, found in outcomes.items() if found["outcome"] == "survived")
    (project / "equivalent.json").write_text(json.dumps({survivor: "nobody reads the log"}))
    (project / "test_sums.py").write_text("def test(): assert False\n")
    assert run(project) == 0
    assert "nobody reads the log" in capsys.readouterr().out
    # A change of the function makes its results void; tests that fail anyway prove nothing.
    (project / "mpoe" / "sums.py").write_text(before + "    # changed\n" + "    return 0 + 1\n")
    assert run(project) == 1
    assert "the tests fail without a mutant" in capsys.readouterr().err


@pytest.mark.slow
def test_a_mutant_that_never_ends_is_killed(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "test_sums.py").write_text(
        "from mpoe.loop import count\ndef test(): assert [count(0), count(3)] == [0, 3]\n"
    )
    (project / "table.toml").write_text('[loop]\nfunctions = ["loop.py:count"]\ntests = ["test_sums.py"]\n')
    monkeypatch.setattr(mutants, "SHORTEST_LIMIT", 0.0)
    assert run(project) == 0
    assert "killed (time)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_build_that_fails(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a mutant: no build, which proves nothing of the tests. Of none: an error."""
    table = project / "table.toml"
    build = "import sys; sys.exit('append' not in open('mpoe/sums.py').read())"
    table.write_text(table.read_text() + f'build = ["{{python}}", "-c", "{build}"]\nbuilt = "lib"\n')
    (project / "lib").write_text("built")
    run(project)
    assert "no build" in capsys.readouterr().out
    table.write_text(table.read_text().replace("'append'", "'absent'"))
    assert run(project, "--again") == 1
    assert "the build fails without a mutant" in capsys.readouterr().err


def test_an_interrupted_run_leaves_nothing_running(project: Path) -> None:
    (project / "test_sums.py").write_text("import time\ndef test(): time.sleep(600)\n")
    paths = ("--root", project, "--table", project / "table.toml", "--equivalent", project / "equivalent.json")
    command = [sys.executable, "-u", ROOT / "tools" / "mutants.py", *paths, "--import_first"]
    environment = os.environ | {"TMPDIR": str(project.parent)}
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stderr=subprocess.DEVNULL,
        # What runs behind a shell's & inherits that the signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    folders, deadline = [], time.monotonic() + 180
    while time.monotonic() < deadline and not folders:
        folders = [f for f in project.parent.glob("mutants-*") if (f / "test_sums.py").is_file()]
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=180) != 0
    assert folders
    assert not folders[0].exists()


def test_options(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(project, "--list") == 0
    assert "sums: mpoe/sums.py:3 operator: a + b  ->  (a - b)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(project, "--areas", "absent")
    assert "--areas must be some of sums; got absent" in capsys.readouterr().err
