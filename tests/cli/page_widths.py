"""Measures in a headless Chromium what of HTML pages does not fit into a window of a given width."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HARNESS = "_widths.html"  # every page in a frame of every width; the answer is written where --dump-dom shows it
SCRIPT = """
function excess(element) { return element.scrollWidth - element.clientWidth; }
function scrolls(element) {
  for (let e = element; e; e = e.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX) && excess(e) > 1) return e;
  return null;
}
window.onload = () => {
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, cut = [];
    for (const element of page.querySelectorAll("pre > code, table, p code")) {
      const box = element.closest("details:not([open])") ? null : scrolls(element);
      if (!box || box === page.documentElement) continue;
      const columns = element.rows ? element.rows[0].cells.length : 0;
      cut.push({kind: columns ? `table of ${columns}` : (element.closest("[class*=language-]") || element).className,
                text: element.textContent.trim().slice(0, 60)});
    }
    found.push({page: frame.dataset.page, width: +frame.width, cut,
                excess: excess(page.documentElement)});
  }
  document.getElementById("answer").textContent = JSON.stringify(found);
};
"""


class Page(NamedTuple):
    """What was seen of a page: pixels that the page itself is too wide, and the elements that are cut or scroll."""

    page: str
    width: int
    excess: int
    cut: list[dict[str, str]]  # kind ("language-text highlight", "table of 5"), text


def chromium() -> str | None:
    """A Chromium on PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


def measure(folder: Path, pages: Sequence[str], widths: Sequence[int], program: str, profile: Path) -> list[Page]:
    """Load ``pages`` (paths below ``folder``) at each of ``widths`` and say what does not fit."""
    frames = [
        f'<iframe src="{page}" data-page="{page}" width="{width}" height="900" style="border:0"></iframe>'
        for page in pages
        for width in widths
    ]
    text = f'<pre id="answer"></pre>{"".join(frames)}<script>{SCRIPT}</script>'
    (folder / HARNESS).write_text(f"<!doctype html><body>{text}</body>", encoding="utf-8")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--window-size=1600,900", "--dump-dom", f"http://127.0.0.1:{server.server_port}/{HARNESS}"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    finally:
        server.shutdown()
        server.server_close()
        (folder / HARNESS).unlink()
    found = re.search(r'<pre id="answer">(.*?)</pre>', answer.stdout, flags=re.S)
    if not found or not found[1]:
        raise AssertionError(f"the pages were not measured: {answer.stderr[-2000:]}")
    return [Page(**entry) for entry in json.loads(html.unescape(found[1]))]
