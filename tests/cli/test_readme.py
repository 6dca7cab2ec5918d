"""Commands and examples of the README run, on small data; CI runs its two marked ones. CONTRIBUTING has the tree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from .cli_documents import run_commands, run_python

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_commands(cli, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sentiment.rename(tmp_path / "my_folder")
    assert run_commands(cli, README) == {"train", "plan"}


def test_links_lead_somewhere() -> None:
    links = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert len(links) >= 10
    assert all((ROOT / link).exists() for link in links)


def test_one_screen_and_a_half() -> None:
    lines = README.splitlines()
    assert len(lines) <= 75
    assert all(len(line) <= 120 for line in lines if not line.startswith("|"))


def test_it_says_so_until_a_gpu_was_measured() -> None:
    """`bench/gpu.sh` leaves a list of its parts beside its report."""
    visits = list((ROOT / "bench" / "results").glob("*/visit.md"))
    assert ("nothing was measured on a GPU yet" in " ".join(README.split())) == (not visits)


def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(README)
    assert (tmp_path / "my-mpoe-t5" / "model.safetensors").is_file()
    assert "auxiliary" in capsys.readouterr().out


def listed_folders() -> list[str]:
    """Folders of the tree, as paths."""
    tree = CONTRIBUTING.partition("<!-- tree:")[2].partition("```text\n")[2].partition("```")[0]
    paths, package = [], ""
    for line in tree.splitlines():
        name = line.split()[0].rstrip("/")
        package = package if line.startswith("  ") else name
        paths.append(name if name == package else f"{package}/{name}")
    return paths


def test_the_tree_is_the_real_one() -> None:
    listed = listed_folders()
    for package in ("mpoe", "mpoe_kernels"):
        inside = {f"{package}/{path.parent.name}" for path in (ROOT / package).glob("*/__init__.py")}
        assert inside == {path for path in listed if path.startswith(f"{package}/")}
    assert all((ROOT / path).is_dir() for path in listed)


def test_the_tree_is_whole(lacks) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        lacks("not a checkout of git")
    folders = {file.partition("/")[0] for file in tracked if "/" in file and not file.startswith(".")}
    assert folders == {path for path in listed_folders() if "/" not in path}
