"""Every command and example of the pages in docs/ runs, and the pages know every public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mpoe
import mpoe.data
import mpoe_kernels
from mpoe.data.tasks import standard_specs

from .cli_documents import blocks, run_commands, run_python, write_files

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(cli, page: Path, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    fences = len(re.findall(r"^```\w", text, flags=re.M))
    assert fences == sum(len(blocks(text, language)) for language in ("python", "bash", "text", "yaml")), (
        "a block nobody runs"
    )
    monkeypatch.chdir(tmp_path)
    sentiment.rename(tmp_path / "my_folder")
    write_files(text, tmp_path)
    run_python(text)
    run_commands(cli, text)


def test_every_described_task_is_listed() -> None:
    rows = [line for line in (DOCS / "tasks.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    for name, spec in standard_specs().items():
        (row,) = (row.split(" | ") for row in rows if f"`{name}`" in row.split(" | ")[0])
        assert set(row[1].split(", ")) == set(spec.labels) or not spec.labels, name
        assert row[2] == ", ".join(spec.metrics), name
        assert row[3].removesuffix(" |") == (spec.hub_data.path if spec.hub_data else "(a folder of yours)"), name


API_PAGES = [("api_mpoe", mpoe), ("api_data", mpoe.data), ("api_kernels", mpoe_kernels)]


@pytest.mark.parametrize(("page", "package"), API_PAGES)
def test_every_public_name_is_described(page: str, package) -> None:
    described = {line.rsplit(".", 1)[1] for line in (DOCS / f"{page}.md").read_text().splitlines() if "::: " in line}
    # What converted models inherit, and what stands in modules of its own.
    elsewhere = {"MPOEModelMixin", "solve_routers", "split_hidden_experts", "update_correction_bias"}
    assert described - elsewhere == set(package.__all__) - {"__version__"}
