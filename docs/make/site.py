"""What mkdocs calls while it builds the site: the notebook as a page, the public names, the recipes."""

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import attire
from attire.cli.options import format_setting
from attire.recipes import RECIPES, SETTINGS

NOTEBOOK = Path(__file__).parent.parent.parent / "examples" / "story.ipynb"
NAMES = "<!-- public names -->"
TABLE = "<!-- recipes -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The notebook as a page: its prose, its code, its stored outputs."""
    files.append(File.generated(config, "notebook.md", content=as_markdown(json.loads(NOTEBOOK.read_text("utf-8")))))
    return files


def as_markdown(book: dict[str, Any]) -> str:
    parts = []
    for cell in book["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        parts += [part for output in cell.get("outputs", []) if (part := told(output))]
    return "\n\n".join(parts) + "\n"


def told(output: dict[str, Any]) -> str:
    """A stored output as Markdown: a picture inside the page, or text."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f"![output](data:image/png;base64,{picture})"
    text = "".join(data.get("text/plain") or output.get("text") or [])
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What the code itself knows, in its place."""
    return markdown.replace(NAMES, names()).replace(TABLE, recipes())


def names() -> str:
    """`attire.__all__`, each name documented where it lives."""
    homes = [attire._HOMES[name] for name in attire.__all__]
    return "\n\n".join(f"::: {module}.{name}" for module, name in homes)


def recipes() -> str:
    """A table: every field in each named recipe, and what it is."""
    lines = [f"| flag | {' | '.join(f'`{name}`' for name in RECIPES)} | |", "|---|" + "---|" * (len(RECIPES) + 1)]
    for name, setting in SETTINGS.items():
        values = " | ".join(format_setting(getattr(recipe, name)) for recipe in RECIPES.values())
        lines.append(f"| `--{name.replace('_', '-')}` | {values} | {setting.metadata['help']} |")
    return "\n".join(lines)
