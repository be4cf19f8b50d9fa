"""The model behind its two queues: predictions in batches and explanations one by one, in threads of their own."""

import asyncio
import copy
import os
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from attire.data import photos
from attire.errors import AttireError
from attire.inference.classifier import Classifier
from attire.inference.prediction import Prediction
from attire.server import responses
from attire.server.batching import DeadlineExceeded, MicroBatches, QueueFull
from attire.server.metrics import Metrics
from attire.server.problems import queue_full, try_again
from attire.server.responses import Answer, ModelInput
from attire.server.settings import Settings
from attire.server.uploads import UploadBudget, not_a_picture

_NICE = 10  # niceness of the threads that run the model, see docs/serving.md


class Predictor(Protocol):
    """A Classifier, or an exported file of it."""

    def predict(self, images: NDArray[np.uint8], /) -> Sequence[Prediction]: ...


class Service:
    """One model, the queues before it and what is counted; `run` starts and ends its threads.

    classifier: explains, and says what the model is; predictor: predicts, the same model perhaps in another runtime.
    """

    def __init__(self, classifier: Classifier, predictor: Predictor, settings: Settings) -> None:
        self.classifier, self.settings, self._predictor = classifier, settings, predictor
        self.draining = False
        self.uploads = UploadBudget(settings.max_arriving)
        self.metrics = Metrics(lambda: self.predictions.waiting + self.explanations.waiting)
        on_cpu = getattr(classifier, "device", torch.device("cpu")).type == "cpu"
        workers = settings.workers or min(2 if on_cpu else 1, torch.get_num_threads())
        self._threads = settings.threads or max(1, torch.get_num_threads() // workers)
        self._explaining_copy = _copy_sharing_weights(classifier)
        self.predictions = MicroBatches(
            _prepare_upload,
            self._predict,
            max_waiting=settings.max_queue,
            max_batch=settings.max_batch,
            seconds=settings.seconds,
            workers=workers,
            on_batch=self.metrics.observe_batch,
            on_thread_start=self._set_up_thread,
        )
        self.explanations = MicroBatches(
            lambda answer: answer,
            self._explain,
            max_waiting=settings.max_explain,
            max_batch=1,
            seconds=settings.explain_seconds,
            on_thread_start=self._set_up_thread,
        )

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Answers requests until the block ends; what was accepted by then is answered first."""
        self.predictions.start()
        self.explanations.start()
        for count in {1, self.settings.max_batch}:  # so that no picture waits for what PyTorch sets up at a first pass
            await asyncio.to_thread(self.predict_blank, count)
        yield
        self.draining = True
        await asyncio.gather(self.predictions.close(), self.explanations.close())

    def start_draining(self) -> None:
        """From now on /readyz says that the server is not ready, and every response ends its connection."""
        self.draining = True

    def predict_blank(self, count: int = 1) -> None:
        """A forward pass of black images. Raises what the model raises where it does not work."""
        self._predict([ModelInput(np.zeros((28, 28), np.uint8), "")] * count)

    async def predict(self, uploads: Sequence[bytes]) -> list[Answer | Exception]:
        """An answer for each picture file, or the exception that stands for it: a Problem where it is no picture.

        Raises Problem where there is no room for all of them or no time.
        """
        return await _ask(self.predictions, uploads)

    async def explain(self, answer: Answer) -> dict[str, Any]:
        """What /explain adds to this answer. Raises Problem where there is no room or no time."""
        (explanation,) = await _ask(self.explanations, [answer])
        if isinstance(explanation, Exception):
            raise explanation
        return dict(explanation)

    def _set_up_thread(self) -> None:
        torch.set_num_threads(self._threads)  # of the thread that calls it
        if sys.platform == "linux":  # where niceness is a thread's own: refusals must not wait for answers
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)

    def _predict(self, inputs: list[ModelInput]) -> list[Answer]:
        predictions = self._predictor.predict(np.stack([model_input.image for model_input in inputs]))
        return [Answer(model_input, prediction) for model_input, prediction in zip(inputs, predictions, strict=True)]

    def _explain(self, answers: list[Answer]) -> list[dict[str, Any]]:
        return [responses.describe_explanation(self._explaining_copy, answer) for answer in answers]


async def _ask(batches: MicroBatches[Any, Any, Any], sources: Sequence[Any]) -> list[Any]:
    try:
        answers = await batches.ask(sources)
    except QueueFull:
        raise queue_full() from None
    except DeadlineExceeded:
        raise try_again("deadline", "no answer within the time a request has") from None
    return [not_a_picture(answer) if isinstance(answer, AttireError) else answer for answer in answers]


def _prepare_upload(data: bytes) -> ModelInput:
    """The one place where an upload becomes what the model sees. Raises AttireError for what is no sound picture."""
    photo = photos.prepare(data)
    return ModelInput(photo.image, photo.polarity)


def _copy_sharing_weights(classifier: Classifier) -> Classifier:
    """The same weights in other modules: explaining hooks into modules while another thread predicts."""
    shared = {id(tensor): tensor for tensor in (*classifier.model.parameters(), *classifier.model.buffers())}
    duplicate = copy.copy(classifier)
    duplicate.model = copy.deepcopy(classifier.model, shared)
    return duplicate
