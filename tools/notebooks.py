"""The notebooks of examples/: made from the scripts there and run, with their output stored; and as
pages of the docs.

    python tools/notebooks.py [NAME ...]    writes examples/NAME.ipynb; needs pip install ".[docs]"

The scripts are the source: every cell of a notebook is a cell (`# %%`) of its script. For mkdocs
this is a hook.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("convert_and_look", "fine_tune_and_compare", "several_domains")
NO_ARGUMENTS = (
    "import sys\n\nsys.argv = sys.argv[:1]  # those of the notebook's kernel are not the script's"
)


def cells_of(script: str) -> list[tuple[str, str]]:
    """The cells of a script, as ``("markdown" | "code", text)``. A paragraph on shell usage is left
    out."""
    cells = []
    for part in script.split("# %%")[1:]:
        if part.startswith(" [markdown]"):
            lines = part.partition("\n")[2].strip().splitlines()
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
            cells.append(("markdown", re.sub(r"\n\nusage: .*", "", text)))
        else:
            cells.append(("code", part.strip("\n")))
    return cells


def notebook(name: str) -> Any:
    """The notebook of a script, without output."""
    import nbformat.v4 as v4

    made = v4.new_notebook()
    cells = cells_of((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    for kind, text in [*cells[:1], ("code", NO_ARGUMENTS), *cells[1:]]:
        made.cells.append(
            v4.new_markdown_cell(text) if kind == "markdown" else v4.new_code_cell(text)
        )
        made.cells[-1]["id"] = f"cell-{len(made.cells)}"  # not random
    return made


def run(made: Any, folder: Path) -> Any:
    """Execute all cells in ``folder``; an error in a cell stops the run."""
    from nbclient import NotebookClient

    NotebookClient(
        made, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # times
        cell["outputs"] = [
            output for output in cell.get("outputs", []) if output.get("name") != "stderr"
        ]
        for output in cell["outputs"]:
            if "text" in output:
                output["text"] = plain(output["text"])
        if cell.cell_type == "markdown":
            del cell["outputs"]
    made.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    return made


def plain(text: str) -> str:
    """Without a terminal's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def page_of(notebook: dict[str, Any]) -> str:
    """A notebook's JSON as Markdown: text, code, printed output as text, pictures embedded in the
    page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = ""
        for output in [*cell.get("outputs", []), {}]:  # the last one ends what was printed
            data = output.get("data", {})
            picture = "".join(data.get("image/png", "")).strip()
            if not picture:
                printed += "".join(output.get("text") or data.get("text/plain", ""))
            if printed.strip() and (picture or not output):
                parts.append(f"```text\n{plain(printed).rstrip()}\n```")
                printed = ""
            parts += [f"![](data:image/png;base64,{picture})"] if picture else []
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """mkdocs' hook: a page ``notebook_NAME.md`` for each."""
    from mkdocs.structure.files import File

    for file in sorted(EXAMPLES.glob("*.ipynb")):
        page = page_of(json.loads(file.read_text(encoding="utf-8")))
        files.append(File.generated(config, f"notebook_{file.stem}.md", content=page))
    return files


def main() -> None:
    import nbformat

    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            made = run(notebook(name), Path(folder))
        nbformat.write(made, EXAMPLES / f"{name}.ipynb")
        print(EXAMPLES / f"{name}.ipynb")


if __name__ == "__main__":
    main()
