"""Every command and example of the pages in docs/ runs, and the pages know every public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_documents import blocks, run_commands, run_python

import mpoe
import mpoe_kernels

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(cli, page: Path, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    fences = len(re.findall(r"^```\w", text, flags=re.M))
    assert fences == sum(len(blocks(text, language)) for language in ("python", "bash", "text")), "a block nobody runs"
    monkeypatch.chdir(tmp_path)
    sentiment.rename(tmp_path / "my_folder")
    run_python(text)
    run_commands(cli, text)


@pytest.mark.parametrize(("page", "package"), [("api_mpoe", mpoe), ("api_kernels", mpoe_kernels)])
def test_every_public_name_is_described(page: str, package) -> None:
    described = {line.rsplit(".", 1)[1] for line in (DOCS / f"{page}.md").read_text().splitlines() if "::: " in line}
    assert described - {"MPOEModelMixin"} == set(package.__all__) - {"__version__"}  # what converted models inherit
