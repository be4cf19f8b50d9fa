"""A finished run on disk: its result, its report and its bundle."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from attire.evaluation import run_result
from attire.evaluation.model_card import write_model_card
from attire.evaluation.report import write_report
from attire.evaluation.run_result import RunResult
from attire.features.sources import Standardiser
from attire.inference.classifier import Classifier
from attire.model import heads, vgg
from attire.model.heads import fold_standardisation
from attire.progress import Epoch
from attire.storage import files
from attire.training.experiment import Experiment
from attire.training.outcome import Outcome

if TYPE_CHECKING:
    import torchvision

_METADATA = ("n", "correct", "accuracy", "accuracy_low", "accuracy_high")  # of the test set, in a bundle


def make_result(
    experiment: Experiment,
    outcome: Outcome,
    folder: Path,
    *,
    history: Sequence[Epoch],
    seconds: dict[str, float],
    claimed: float,
    teacher: Mapping[str, Any] | None,
) -> RunResult:
    """seconds: see `run_result.spent`; claimed: accuracy as a fraction; teacher: what `data.json` records of it."""
    test, data = experiment.splits.test, experiment.describe_data(teacher)
    skew = {"skew": outcome.skew.to_json()} if outcome.skew else {}
    return RunResult(
        title=f"Attire {experiment.recipe.name} on {data['name']}",
        recipe=experiment.recipe.name,
        seed=experiment.recipe.seed,
        command=f"attire train --config {shlex.quote(str(folder / 'config.json'))}",
        test=outcome.test,
        train=outcome.train,
        val=outcome.val,
        ood=outcome.ood,
        predictions=run_result.Predictions.of_test_set(test.labels, outcome.probabilities, test.images),
        history=[asdict(epoch) for epoch in history],
        seconds=seconds,
        config=files.read_json(folder / "config.json"),
        environment={**experiment.environment(), **skew},
        data=data,
        claimed=claimed,
    )


def assemble_network(
    experiment: Experiment, head: nn.Sequential, standardiser: Standardiser
) -> "torchvision.models.VGG":
    """The network that ships: a plain VGG16 with the trained head, fine-tuned blocks back in `features`.

    The standardisation is folded into the head, which is moved to the CPU. The frozen weights are read afresh from the
    verified file.
    """
    if standardiser.mean is not None and standardiser.scale is not None:
        fold_standardisation(head, standardiser.mean, standardiser.scale)
    head.cpu()
    tuned = head if isinstance(head, heads.FineTunedHead) else None
    classifier = tuned.head if tuned else head
    model = vgg.vgg16(experiment.weights, experiment.architecture.end, experiment.recipe.pool, classifier)
    if tuned:
        model.load_state_dict({**model.state_dict(), **tuned.folded_convolutions()})
    return model


def save_run(
    folder: Path,
    experiment: Experiment,
    head: nn.Sequential,
    standardiser: Standardiser,
    outcome: Outcome,
    result: RunResult,
) -> None:
    """Write evaluation, report, bundle and model card into the run's folder."""
    run_result.save_result(folder, result)
    write_report(folder, result)
    test = result.test.to_json()
    metadata = {
        "name": result.title,
        "recipe": experiment.recipe.to_json(),
        "test": {key: test[key] for key in _METADATA},
        "test_digest": experiment.splits.test_data.image_digest,
        "backbone_digest": experiment.spec.weights,
    }
    classifier = Classifier(
        assemble_network(experiment, head, standardiser),
        experiment.architecture,
        experiment.splits.data.classes,
        outcome.temperature,
        metadata,
        ood_detector=outcome.ood_detector,
        neighbours=outcome.neighbours,
    )
    classifier.save(folder / "model")
    write_model_card(folder / "model", result)
