"""What mkdocs calls while it builds the site: places that are not filled yet, the notebook, the public names."""

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import attire
from attire.cli import FIELD_HELP, shown
from attire.recipes import RECIPES

PLACES = {"estimator.md", "other-data.md"}  # may be missing; take a name out once its page is there
NOTEBOOK = "notebook.md"  # made of the one notebook under docs/, where there is one
NAMES = "<!-- public names -->"
TABLE = "<!-- recipes -->"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take places without a page out of the navigation."""
    folder = Path(config.docs_dir)
    absent = {name for name in PLACES if not (folder / name).exists()}
    if notebook(folder) is None:
        absent.add(NOTEBOOK)
    config.nav = kept(config.nav, absent)
    return config


def kept(nav: list[Any], absent: set[str]) -> list[Any]:
    """The navigation without those pages, in sections too."""
    found = []
    for item in nav:
        if isinstance(item, dict):
            ((title, target),) = item.items()
            if isinstance(target, list):
                target = kept(target, absent)
            elif target in absent:
                continue
            item = {title: target}
        found.append(item)
    return found


def notebook(folder: Path) -> Path | None:
    found = [path for path in sorted(folder.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    if len(found) > 1:
        raise ValueError(f"expected one notebook, found {', '.join(map(str, found))}")
    return found[0] if found else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The notebook as a page: its prose, its code, its stored outputs."""
    if path := notebook(Path(config.docs_dir)):
        files.append(File.generated(config, NOTEBOOK, content=as_markdown(json.loads(path.read_text("utf-8")))))
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
    for field, meaning in FIELD_HELP.items():
        values = " | ".join(shown(getattr(recipe, field)) for recipe in RECIPES.values())
        lines.append(f"| `--{field.replace('_', '-')}` | {values} | {meaning} |")
    return "\n".join(lines)
