"""A model card in the layout of the Hugging Face hub: YAML that machines read, then what people should know."""

import json
from pathlib import Path
from typing import Any

from attire.evaluation.metrics import Evaluation
from attire.evaluation.pages import percent
from attire.evaluation.report import FIGURES, cell, flat, hardest
from attire.evaluation.run_result import RunResult
from attire.storage.files import write_text

_TAGS = ("image-classification", "fashion", "garments", "vgg16", "transfer-learning")


def write_model_card(folder: Path, result: RunResult) -> Path:
    """`README.md` beside the bundle, as the hub expects it."""
    path = folder / "README.md"
    write_text(path, model_card(result))
    return path


def model_card(result: RunResult) -> str:
    sections = (_front_matter(result), _about(result), _scores(result), _limits(result), _USE, _made(result))
    return "\n\n".join(sections) + "\n"


def _front_matter(result: RunResult) -> str:
    """Strings are written as JSON, which YAML reads, so no class or data name can break out of its line."""
    test, name = result.test, str(result.data.get("name", "garment images"))
    kind, told = json.dumps(name.lower().replace(" ", "-")), json.dumps(f"Accuracy {_described(test)}")
    return "\n".join(
        (
            "---",
            "library_name: attire",
            "pipeline_tag: image-classification",
            f"tags: {json.dumps(_TAGS)}",
            "metrics: [accuracy]",
            "model-index:",
            f"- name: {json.dumps(result.title)}",
            "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{name: {json.dumps(name)}, type: {kind}, split: test}}",
            "    metrics:",
            f"    - {{type: accuracy, value: {test.accuracy.value:.4f}, name: {told}}}",
            f"    - {{type: f1, value: {test.macro_f1.value:.4f}, name: Macro F1}}",
            "---",
        )
    )


def _described(found: Evaluation) -> str:
    return f"({found.accuracy.span()} %, n = {found.n:,}, {found.accuracy.method})"


def _about(result: RunResult) -> str:
    names = ", ".join(_escaped(name) for name in result.classes)
    return (
        f"# {_escaped(result.title)}\n\n"
        "A classifier of garments: a VGG16 pretrained on ImageNet, with a head trained on 28x28 grey images of one"
        f" garment each, light on black. It tells {len(result.classes)} classes apart: {names}."
    )


def _scores(result: RunResult) -> str:
    test = result.test
    lines = [f"| {name} | {' | '.join(cell(getattr(test, key), share))} |" for name, key, share in FIGURES]
    classes = [
        " | ".join((f"| {_escaped(s.name)}", f"{s.support:,}", percent(s.precision.value), percent(s.recall.value)))
        + f" | {s.recall.span()} |"
        for s in test.per_class
    ]
    heads = (
        "| Figure | Value | 95 % interval |\n|---|---:|---:|",
        "| Class | Rows | Precision | Recall | 95 % interval |",
    )
    return "\n".join(
        (
            f"## How good it is\n\nMeasured once on {test.n:,} test images. Claim check: {result.claim}.\n",
            heads[0],
            *lines,
            "",
            heads[1] + "\n|---|---:|---:|---:|---:|",
            *classes,
        )
    )


def _limits(result: RunResult) -> str:
    pairs = [
        f"- {_escaped(pair.true)} called {_escaped(pair.predicted)}: {pair.count:,}, {percent(pair.share)} of that class"
        for pair in result.test.most_confused[:5]
    ]
    told = [
        f"## Where it fails\n\nHardest class: {_escaped(hardest(result.test))}.",
        *(["Most frequent mistakes on the test images:\n\n" + "\n".join(pairs)] if pairs else []),
        "The figures hold for images made like the test images. On photographs of people, of several garments or on"
        " busy backgrounds expect less. It says nothing about persons and must not be used to.",
    ]
    return "\n\n".join(told)


_USE = (
    "## How to use it\n\n"
    "    attire predict MODEL_FOLDER photo.jpg\n\n"
    "or from Python, where `MODEL_FOLDER` is the folder that holds this card:\n\n"
    "    import attire\n"
    '    attire.load("MODEL_FOLDER").predict("photo.jpg").label\n\n'
    "`neighbours.safetensors` holds up to 5,000 of the training images, which `attire explain` shows beside an answer."
    " Delete that file where they must not be passed on; nothing else needs it."
)


def _made(result: RunResult) -> str:
    facts: dict[str, Any] = {"recipe": result.recipe, "seed": result.seed, **result.config}
    rows = [f"| {_escaped(key)} | {_escaped(value)} |" for key, value in flat(facts)]
    machine = [f"| {_escaped(key)} | {_escaped(value)} |" for key, value in flat(result.environment)]
    return "\n".join(
        (
            "## How it was made\n",
            "    " + " ".join(result.command.split()) + "\n",
            "| Setting | Value |\n|---|---|",
            *rows,
            *(["\n| Environment | Value |\n|---|---|", *machine] if machine else []),
            "\nThe pretrained blocks come from torchvision's VGG16_Weights.IMAGENET1K_V1; their terms and those of the"
            " data apply to the weights here.",
        )
    )


def _escaped(text: str) -> str:
    """Text that Markdown must not read as a table, a link or HTML."""
    text = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return text.replace("[", "\\[").replace("`", "\\`")
