"""examples/story.ipynb run again, its outputs stored in it. Wants data and weights: `attire fetch`.

python docs/make/notebook.py
"""

import json
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from attire.storage import files

NOTEBOOK = Path(__file__).parent.parent.parent / "examples" / "story.ipynb"
SECONDS = 600  # at most, a cell


def digest(book: dict[str, Any]) -> str:
    """Of all cells' sources, in their order: what the stored outputs belong to."""
    return files.sha256(files.canonical_json([[cell["cell_type"], "".join(cell["source"])] for cell in book["cells"]]))


def run(path: Path, folder: Path) -> dict[str, Any]:
    """The notebook with its outputs, executed in `folder` by the kernel `python3`; nothing of the machine in it."""
    book = nbformat.read(path, as_version=4)
    NotebookClient(
        book, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # when it was run
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    about = {"kernelspec": book.metadata.kernelspec, "language_info": {"name": "python"}}
    book.metadata = nbformat.NotebookNode({**about, "attire": {"sources": digest(book)}})
    return dict(book)


if __name__ == "__main__":
    made = run(NOTEBOOK, NOTEBOOK.parent)
    files.write_text(NOTEBOOK, json.dumps(made, indent=1, ensure_ascii=False) + "\n")
