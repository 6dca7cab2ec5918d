"""An mkdocs hook: the notebooks of examples/ as pages, with the output and pictures stored in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def page_of(notebook: dict[str, Any]) -> str:
    """A notebook's JSON as Markdown: text, code, printed output as text, pictures embedded in the page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed: list[str] = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                parts += as_text(printed)
                parts.append(f"![](data:image/png;base64,{''.join(data['image/png']).strip()})")
                printed = []
            else:
                printed += output["text"] if output["output_type"] == "stream" else data.get("text/plain", [])
        parts += as_text(printed)
    return "\n\n".join(parts) + "\n"


def as_text(printed: list[str]) -> list[str]:
    """Printed output as a block, without colours; empty if nothing was printed."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", "".join(printed)).rstrip()
    return [f"```text\n{text}\n```"] if text else []


def on_files(files: Files, config: Any) -> Files:
    for file in sorted(EXAMPLES.glob("*.ipynb")):
        page = page_of(json.loads(file.read_text(encoding="utf-8")))
        files.append(File.generated(config, f"notebook_{file.stem}.md", content=page))
    return files
