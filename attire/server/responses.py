"""What the endpoints say about a picture and about the model, as values for JSON."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attire.evaluation.png import data_uri, grey_png
from attire.inference.classifier import Classifier
from attire.inference.prediction import Prediction
from attire.server.samples import read_samples
from attire.server.settings import Settings
from attire.server.uploads import PICTURE_TYPES
from attire.version import __version__

# What /model shows of a bundle's metadata.
_PUBLIC_METADATA = ("name", "recipe", "test", "test_digest", "backbone_digest")


@dataclass(frozen=True, eq=False)
class ModelInput:
    """A picture as the model sees it, (28, 28) uint8, and the polarity that the original had."""

    image: NDArray[np.uint8]
    polarity: str


@dataclass(frozen=True)
class Answer:
    """A prediction, and the model input that it is about."""

    model_input: ModelInput
    prediction: Prediction


def describe_answer(answer: Answer, start: float, top_k: int) -> dict[str, Any]:
    """The answer to /predict. start: `time.perf_counter()` when the request's body was complete."""
    prediction = answer.prediction
    return {
        "label": prediction.label,
        "probability": prediction.probability,
        "ranking": [{"label": label, "probability": p} for label, p in prediction.ranking[:top_k]],
        "out_of_distribution": prediction.out_of_distribution,
        "distance": prediction.distance,
        "verdict": _verdict(prediction),
        "model_input": _png_uri(answer.model_input.image),
        "polarity": answer.model_input.polarity,
        "milliseconds": round(1000 * (time.perf_counter() - start), 2),
    }


def describe_explanation(classifier: Classifier, answer: Answer) -> dict[str, Any]:
    """What /explain adds to the prediction."""
    from attire.inference import explain  # imports matplotlib, for which predictions need not wait

    explanation = explain.explain(classifier, answer.model_input.image, answer.prediction.label)
    return {
        "heat_map": data_uri(explanation.heat_map_png()),
        "method": explanation.method,
        "neighbours": [
            {"label": near.label, "distance": float(near.distance), "image": _png_uri(near.image)}
            for near in explanation.neighbours
        ],
    }


def describe_model(classifier: Classifier, settings: Settings) -> dict[str, Any]:
    """The answer to /model: nothing but what is named here leaves the server."""
    ood_detector = classifier.ood_detector
    return {
        "name": str(classifier.metadata.get("name", "unnamed")),
        "version": __version__,
        "classes": list(classifier.classes),
        "temperature": classifier.temperature,
        "image_size": classifier.architecture.image_size,
        "freeze_to": classifier.architecture.end,
        "ood_detector": None if ood_detector is None else ood_detector.to_json(),
        "metadata": {name: classifier.metadata[name] for name in _PUBLIC_METADATA if name in classifier.metadata},
        "limits": {
            "upload_bytes": settings.max_upload,
            "batch_images": settings.batch_images,
            "batch_bytes": settings.max_json,
            "queue_images": settings.max_queue,
            "seconds": settings.seconds,
        },
        "media_types": list(PICTURE_TYPES),
    }


def describe_samples() -> dict[str, Any]:
    """The answer to /samples."""
    return {"samples": [{"name": name, "image": _png_uri(image)} for name, image in read_samples()]}


def _png_uri(image: NDArray[np.uint8]) -> str:
    return data_uri(grey_png(image))


def _verdict(prediction: Prediction) -> str:
    """The answer in words. Probabilities are calibrated, so words may stand for them."""
    if prediction.out_of_distribution:
        return str(prediction)
    if prediction.probability >= 0.9:
        return prediction.label
    word = "probably" if prediction.probability >= 0.6 else "perhaps"
    return f"{word} {prediction.label}; else {prediction.ranking[1][0]}"
