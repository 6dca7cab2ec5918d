"""The built pages, and reports, fit into a window of a laptop and of a phone: measured in a headless Chromium."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from .page_widths import Page, chromium, measure
from .test_cli_compare import make_run

ROOT = Path(__file__).resolve().parents[2]
LAPTOP, PHONE = 1300, 390
MOST_COLUMNS = 4  # of a table that fits into a phone


def may_scroll(page: Page, kind: str) -> bool:
    """Within its own box: on a phone, wide tables and what is drawn in characters."""
    columns = int(kind.removeprefix("table of ")) if kind.startswith("table") else 0
    return page.width == PHONE and (columns > MOST_COLUMNS or "language-text" in kind)


@pytest.fixture(scope="module")
def program() -> str:
    found = chromium()
    if found is None:
        pytest.skip("no Chromium on PATH (apt-get install chromium)")
    return found


@pytest.mark.slow
def test_pages_fit(program: str, lacks, tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        lacks('pip install ".[docs]"')
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, check=True)
    names = sorted(str(file.relative_to(site)) for file in site.rglob("index.html"))
    assert len(names) > len(list((ROOT / "docs").glob("*.md"))) - 1
    pages = measure(site, names, (LAPTOP, PHONE), program, tmp_path / "profile")
    assert len(pages) == 2 * len(names)
    assert not [page for page in pages if page.excess > 0]
    assert not [(page.page, page.width, it) for page in pages for it in page.cut if not may_scroll(page, it["kind"])]


@pytest.mark.slow
def test_the_comparisons_report_fits(cli, program: str, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 0.7, rate) for name, rate in (("dense", 1e-3), ("separable", 2e-3))]
    assert cli("compare", *runs, "--output_dir", tmp_path / "out").code == 0
    for page in measure(tmp_path / "out", ["report.html"], (LAPTOP, PHONE), program, tmp_path / "profile"):
        assert (page.excess <= 0, page.cut) == (True, []), page


@pytest.mark.slow
def test_the_measure_sees_what_is_cut(program: str, tmp_path: Path) -> None:
    style = "<style>body{margin:0} pre{overflow:auto}</style>"
    wide = "<table><tr><td>{}</td><td>x</td></tr></table>".format("w" * 300)
    (tmp_path / "code.html").write_text(f"<!doctype html>{style}<pre><code>{'c' * 300}</code></pre>")
    (tmp_path / "table.html").write_text(f"<!doctype html>{style}{wide}")
    (tmp_path / "fits.html").write_text(f"<!doctype html>{style}<pre><code>{'c' * 20}</code></pre>")
    names = ["code.html", "table.html", "fits.html"]
    code, table, fits = measure(tmp_path, names, (PHONE,), program, tmp_path / "profile")
    assert code.excess <= 0
    assert [it["text"] for it in code.cut] == ["c" * 60]
    assert table.excess > 0
    assert fits == Page("fits.html", PHONE, fits.excess, [])
    assert fits.excess <= 0
