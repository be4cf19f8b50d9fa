"""A model card in the layout of the Hugging Face hub: YAML that machines read, then what people should know."""

import json
from pathlib import Path
from typing import Any

from attire.evaluation.intervals import percent
from attire.evaluation.report import describe_training, figure_rows, flatten_settings
from attire.evaluation.run_result import RunResult
from attire.storage.files import write_text

_TAGS = ("image-classification", "fashion", "garments", "vgg16", "transfer-learning")
_USAGE = """## How to use it

    attire predict MODEL_FOLDER photo.jpg

or from Python, where `MODEL_FOLDER` is the folder that holds this card:

    import attire
    attire.load("MODEL_FOLDER").predict("photo.jpg").label

`neighbours.safetensors` holds up to 5,000 of the training images, which `attire explain` shows beside an answer. \
Delete that file if the images must not be passed on; nothing else needs it."""


def write_model_card(folder: Path, result: RunResult) -> Path:
    """Write `README.md` beside the bundle, where the hub expects it."""
    path = folder / "README.md"
    write_text(path, model_card(result))
    return path


def model_card(result: RunResult) -> str:
    """The card as Markdown."""
    sections = (_front_matter, _description, _scores, _limitations, lambda _: _USAGE, _training)
    return "\n\n".join(section(result) for section in sections) + "\n"


def _front_matter(result: RunResult) -> str:
    """Strings are written as JSON, which YAML reads, so no class or data name can break out of its line."""
    test, data = result.test, str(result.data.get("name", "garment images"))
    accuracy = f"Accuracy ({test.accuracy.span()} %, n = {test.n:,}, {test.accuracy.method})"
    return f"""---
library_name: attire
pipeline_tag: image-classification
tags: {json.dumps(_TAGS)}
metrics: [accuracy]
model-index:
- name: {json.dumps(result.title)}
  results:
  - task: {{type: image-classification}}
    dataset: {{name: {json.dumps(data)}, type: {json.dumps(data.lower().replace(" ", "-"))}, split: test}}
    metrics:
    - {{type: accuracy, value: {test.accuracy.value:.4f}, name: {json.dumps(accuracy)}}}
    - {{type: f1, value: {test.macro_f1.value:.4f}, name: Macro F1}}
---"""


def _description(result: RunResult) -> str:
    names = ", ".join(_escaped(name) for name in result.classes)
    training = describe_training(result.config)
    return (
        f"# {_escaped(result.title)}\n\n"
        "A garment classifier: a VGG16 pretrained on ImageNet, with a head trained on 28x28 grey images that each show"
        f" one garment, light on black. It distinguishes {len(result.classes)} classes: {names}."
        + (f"\n\n{training}" if training else "")
    )


def _scores(result: RunResult) -> str:
    test = result.test
    figures = [(name, value, bounds) for name, [(value, bounds)] in figure_rows([test])]
    classes = [
        (s.name, f"{s.support:,}", percent(s.precision.value), percent(s.recall.value), s.recall.span())
        for s in test.per_class
    ]
    return "\n\n".join(
        (
            f"## How good it is\n\nMeasured once on {test.n:,} test images. Claim check: {result.claim}.",
            _table(("Figure", "Value", "95 % confidence interval"), figures, align="---:"),
            _table(
                ("Class", "Rows", "Precision", "Recall", "95 % confidence interval of recall"), classes, align="---:"
            ),
        )
    )


def _limitations(result: RunResult) -> str:
    text = f"## Where it fails\n\nHardest class: {_escaped(result.test.describe_hardest())}.\n\n"
    if result.test.most_confused:
        text += "Most frequent mistakes on the test images:\n\n"
        for pair in result.test.most_confused[:5]:
            pair_text = f"{_escaped(pair.true)} called {_escaped(pair.predicted)}"
            text += f"- {pair_text}: {pair.count:,}, {percent(pair.share)} of that class\n"
        text += "\n"
    return text + (
        "The figures hold for images made like the test images. Expect less on photographs of people, of several"
        " garments or with busy backgrounds. The model says nothing about persons and must not be used to."
    )


def _training(result: RunResult) -> str:
    settings: dict[str, Any] = {"recipe": result.recipe, "seed": result.seed, **result.config}
    environment = flatten_settings(result.environment)
    sections = (
        f"## How it was trained\n\n    {' '.join(result.command.split())}",
        _table(("Setting", "Value"), flatten_settings(settings)),
        *([_table(("Environment", "Value"), environment)] if environment else []),
        "The pretrained blocks come from torchvision's VGG16_Weights.IMAGENET1K_V1; their terms and those of the data"
        " apply to the weights here.",
    )
    return "\n\n".join(sections)


def _table(header: tuple[str, ...], rows: list[Any], align: str = "---") -> str:
    """A Markdown table; `align` is for all columns but the first."""
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(['---', *[align] * (len(header) - 1)])}|"]
    return "\n".join([*lines, *(f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in rows)])


def _escaped(text: str) -> str:
    """Text that Markdown must not read as a table, a link or HTML."""
    text = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return text.replace("[", "\\[").replace("`", "\\`")
