"""The notebooks of examples/: made from the scripts there and run, with their output stored; and as
pages of the docs.

    python tools/notebooks.py [NAME ...]    writes examples/NAME.ipynb; needs pip install ".[docs]"

The scripts are the source: every cell of a notebook is a cell (`# %%`) of its script. For mkdocs
this is a hook.
"""

import json
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import jupytext
from nbformat import v4

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("convert_and_look", "fine_tune_and_compare", "several_domains")
NO_ARGUMENTS = (
    "import sys\n\nsys.argv = sys.argv[:1]  # those of the notebook's kernel are not the script's"
)


def notebook(name: str) -> Any:
    """The notebook of a script, without output."""
    made = jupytext.read(EXAMPLES / f"{name}.py")
    made.cells.insert(1, v4.new_code_cell(NO_ARGUMENTS))
    for number, cell in enumerate(made.cells, 1):
        cell["id"] = f"cell-{number}"  # not random
    return made


def run(made: Any, folder: Path) -> Any:
    """Execute all cells in ``folder``; an error in a cell stops the run."""
    from nbclient import NotebookClient

    client = NotebookClient(made, timeout=600, kernel_name="python3", record_timing=False)
    client.execute(cwd=str(folder))
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    made.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    return made


def page_of(notebook: dict[str, Any]) -> str:
    """A notebook's JSON as Markdown: text, code, printed output as text, pictures embedded in the
    page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            source = f"```python\n{source}\n```"
        parts.append(source)
        for is_text, outputs in groupby(map(_shown, cell.get("outputs", [])), _is_text):
            shown = "".join(outputs)
            if is_text:
                shown = f"```text\n{shown.rstrip()}\n```"
            parts.append(shown)
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    """A picture in Markdown, or a text without a terminal's colours."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).strip()
        return f"![](data:image/png;base64,{picture})"
    text = "".join(output.get("text") or data["text/plain"])
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _is_text(shown: str) -> bool:
    return not shown.startswith("![](data:")


def on_files(files: Any, config: Any) -> Any:
    """mkdocs' hook: a page ``notebook_NAME.md`` for each."""
    from mkdocs.structure.files import File

    for file in sorted(EXAMPLES.glob("*.ipynb")):
        page = page_of(json.loads(file.read_text(encoding="utf-8")))
        files.append(File.generated(config, f"notebook_{file.stem}.md", content=page))
    return files


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            made = run(notebook(name), Path(folder))
        jupytext.write(made, EXAMPLES / f"{name}.ipynb")


if __name__ == "__main__":
    main()
