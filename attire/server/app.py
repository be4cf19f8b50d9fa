"""The app: predictions, explanations, the model's card, health and metrics over HTTP. Plain ASGI; it opens no socket.

No path and no address from a request is ever opened: pictures arrive in bodies, and every other answer is made at the
start.
"""

import asyncio
import copy
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from attire.data import photos
from attire.errors import AttireError, UsageError
from attire.inference.classifier import Classifier
from attire.inference.prediction import Prediction
from attire.server import guards, openapi
from attire.server.batching import DeadlineExceeded, MicroBatches, QueueFull
from attire.server.metrics import MEDIA_TYPE, Meters
from attire.server.problems import Problem, answer_problem, busy, late
from attire.server.samples import data_uri, grey_png, read_samples
from attire.server.uploads import (
    JSON,
    PICTURES,
    Arrivals,
    BodyLimits,
    ClientGone,
    check_headers,
    not_a_picture,
    parse_batch,
    whole_body,
)
from attire.version import __version__

_Result = TypeVar("_Result")
_MB = 1 << 20
_NICE = 10  # of the threads that run the model, see docs/serving.md
_FACTS = ("name", "recipe", "test", "test_digest", "backbone")  # what a bundle says of itself and /model passes on
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"  # the page shows it in a tab
)


class _Predictor(Protocol):
    """A Classifier, or an exported file of it."""

    def predict(self, images: NDArray[np.uint8], /) -> Sequence[Prediction]: ...


@dataclass(frozen=True)
class _Settings:
    """Every limit of the app, and who may ask.

    max_queue: pictures accepted and not yet answered; max_batch: pictures a forward pass, 16 because larger ones were
    not reliably faster on two cores (docs/serving.md) and each waits for the whole of it; max_images: pictures in one
    request to /predict/batch; seconds: from the end of a body to its answer; workers: threads that run the model, 0 for
    two on a CPU (docs/serving.md) and one elsewhere; threads: torch's in each of them, 0 for its share of the cores.
    """

    max_queue: int = 128
    max_batch: int = 16
    max_images: int = 64
    max_explain: int = 8
    max_upload: int = 20 * _MB
    max_json: int = 16 * _MB
    max_arriving: int = 256 * _MB
    seconds: float = 10.0
    explain_seconds: float = 30.0
    stall_seconds: float = 10.0
    body_seconds: float = 60.0
    workers: int = 0
    threads: int = 0
    hosts: tuple[str, ...] = guards.LOOPBACK
    token: str | None = None
    report: str | None = None
    access_log: bool = False

    def __post_init__(self) -> None:
        if (
            min(self.max_queue, self.max_batch, self.max_images, self.max_explain) < 1
            or min(self.threads, self.workers) < 0
        ):
            raise UsageError("server", "limits are numbers of at least 1")
        if self.token is not None and len(self.token) < 16:
            raise UsageError("token", "shorter than 16 characters", do="make one with: openssl rand -hex 16")

    @property
    def most_images(self) -> int:
        return min(self.max_images, self.max_queue)


@dataclass(frozen=True, eq=False)
class Seen:
    """A picture as the model sees it, (28, 28) uint8, and what was made of its background."""

    image: NDArray[np.uint8]
    polarity: str


@dataclass(frozen=True)
class _Answer:
    seen: Seen
    prediction: Prediction


class _Service:
    """The endpoints, around one classifier."""

    def __init__(self, classifier: Classifier, predictor: _Predictor, settings: _Settings) -> None:
        self.classifier, self.predictor, self.settings = classifier, predictor, settings
        self.draining = False
        self.arrivals = Arrivals(settings.max_arriving)
        self.picture_limits = BodyLimits(settings.max_upload, settings.stall_seconds, settings.body_seconds)
        self.json_limits = BodyLimits(settings.max_json, settings.stall_seconds, settings.body_seconds)
        self.meters = Meters(lambda: self.batches.waiting + self.explaining.waiting)
        on_cpu = getattr(classifier, "device", torch.device("cpu")).type == "cpu"
        self.workers = settings.workers or min(2 if on_cpu else 1, torch.get_num_threads())
        self.threads = settings.threads or max(1, torch.get_num_threads() // self.workers)
        self.batches = MicroBatches(
            _seen_image,
            self.answer,
            limit=settings.max_queue,
            most=settings.max_batch,
            seconds=settings.seconds,
            workers=self.workers,
            on_batch=self.meters.batch,
            begin=self.begin,
        )
        self.explaining = MicroBatches(
            lambda answer: answer,
            self.explain_all,
            limit=settings.max_explain,
            most=1,
            seconds=settings.explain_seconds,
            begin=self.begin,
        )
        self.explained = _shared_copy(classifier)
        self.page = _read_page()
        self.fixed = {
            "openapi": _as_json(openapi.document(classifier.classes, settings.most_images, settings.token is not None)),
            "model": _as_json(_model_card(classifier, settings)),
            "samples": _as_json(
                {"samples": [{"name": name, "image": data_uri(grey_png(image))} for name, image in read_samples()]}
            ),
        }

    def routes(self) -> list[Route]:
        return [
            Route("/", self.get_page),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/predict/batch", self.predict_batch, methods=["POST"]),
            Route("/explain", self.explain, methods=["POST"]),
            Route("/samples", self.get_samples),
            Route("/model", self.get_model),
            Route("/report", self.get_report),
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
            Route("/metrics", self.get_metrics),
            Route("/openapi.json", self.get_openapi),
        ]

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Threads run while the app does; the first pictures do not wait for what torch sets up at its first pass."""
        self.batches.start()
        self.explaining.start()
        blank = Seen(np.zeros((28, 28), np.uint8), "")
        for count in {1, self.settings.max_batch}:
            await asyncio.to_thread(self.answer, [blank] * count)
        yield
        self.draining = True
        await asyncio.gather(self.batches.close(), self.explaining.close())

    def begin(self) -> None:
        torch.set_num_threads(self.threads)  # this thread's
        if sys.platform == "linux":  # where it is a thread's own: the loop comes first, or refusals wait for answers
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)

    def answer(self, seen: list[Seen]) -> list[_Answer]:
        """In the model's thread: one forward pass."""
        found = self.predictor.predict(np.stack([one.image for one in seen]))
        return [_Answer(*pair) for pair in zip(seen, found, strict=True)]

    def explain_all(self, answers: list[_Answer]) -> list[dict[str, Any]]:
        return [_explanation(self.explained, found.seen.image, found.prediction.label) for found in answers]

    async def predict(self, request: Request) -> Response:
        top = self.top(request)
        return _Json(self.describe(*await self.one_picture(request), top))

    async def explain(self, request: Request) -> Response:
        top = self.top(request)
        if not self.explaining.has_room():
            raise busy()
        found, start = await self.one_picture(request)
        (more,) = await _while_connected(request, _settle(self.explaining, [found]))
        if isinstance(more, Exception):
            raise more
        return _Json({**self.describe(found, start, top), **more})

    async def one_picture(self, request: Request) -> tuple[_Answer, float]:
        """The answer for the picture in the body, and when the whole body was here."""
        check_headers(request, PICTURES, self.settings.max_upload)
        if not self.batches.has_room():
            raise busy()
        async with whole_body(request, self.picture_limits, self.arrivals) as body:
            start = time.perf_counter()
            (found,) = await _while_connected(request, _settle(self.batches, [body]))
        if isinstance(found, Exception):
            raise found
        return found, start

    async def predict_batch(self, request: Request) -> Response:
        top = self.top(request)
        check_headers(request, JSON, self.settings.max_json)
        if not self.batches.has_room():
            raise busy()
        async with whole_body(request, self.json_limits, self.arrivals) as body:
            start = time.perf_counter()
            found = await asyncio.to_thread(parse_batch, body, self.settings.most_images)
            pictures = [one for one in found if isinstance(one, bytes)]
            answers = iter(await _while_connected(request, _settle(self.batches, pictures)))
        outcomes = [next(answers) if isinstance(one, bytes) else one for one in found]
        return _Json({"predictions": [self.describe_any(one, start, top) for one in outcomes]})

    def top(self, request: Request) -> int:
        """How many classes the ranking shows: all, or what the query says."""
        count, given = len(self.classifier.classes), request.query_params.getlist("top")
        if not given:
            return count
        text = given[0]
        if len(given) > 1 or not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= count):
            raise Problem(400, "top", f"top is given once, as a whole number from 1 to {count}")
        return int(text)

    def describe_any(self, found: _Answer | Exception, start: float, top: int) -> dict[str, Any]:
        if isinstance(found, _Answer):
            return self.describe(found, start, top)
        if isinstance(found, Problem):
            return {"error": found.to_json()}
        raise found

    def describe(self, found: _Answer, start: float, top: int) -> dict[str, Any]:
        told = found.prediction
        return {
            "label": told.label,
            "probability": told.probability,
            "ranking": [{"label": label, "probability": p} for label, p in told.ranking[:top]],
            "out_of_distribution": told.out_of_distribution,
            "distance": told.distance,
            "verdict": _verdict(told),
            "seen": data_uri(grey_png(found.seen.image)),
            "polarity": found.seen.polarity,
            "milliseconds": round(1000 * (time.perf_counter() - start), 2),
        }

    async def get_page(self, _: Request) -> Response:
        return self.page

    async def get_report(self, _: Request) -> Response:
        if self.settings.report is None:
            raise Problem(404, "report", "this model has no report")
        return _html(self.settings.report, _REPORT_POLICY)

    async def get_samples(self, _: Request) -> Response:
        return _Json(self.fixed["samples"])

    async def get_model(self, _: Request) -> Response:
        return _Json(self.fixed["model"])

    async def get_openapi(self, _: Request) -> Response:
        return _Json(self.fixed["openapi"])

    async def get_metrics(self, _: Request) -> Response:
        return Response(self.meters.text(), headers={"Content-Type": MEDIA_TYPE})

    async def healthz(self, _: Request) -> Response:
        return _Json({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        if self.draining:
            raise Problem(503, "draining", "the server is about to stop", {"Retry-After": "5"})
        return _Json({"status": "ready"})

    def leave(self) -> None:
        """From now on not ready, and every response ends its connection."""
        self.draining = True


class _Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else _as_json(content)


def create_app(classifier: Classifier, predictor: _Predictor | None = None, **settings: Any) -> Starlette:
    """An ASGI app that answers with this classifier; `settings` are the fields of Settings.

    predictor: answers instead of it, being the same model in another runtime; the classifier explains.
    `app.state.service.leave()` makes it say that it is not ready any more.
    """
    service = _Service(classifier, predictor or classifier, _Settings(**settings))
    chosen = service.settings
    guard = Middleware(
        guards.Guard,
        hosts=frozenset(host.lower() for host in chosen.hosts),
        token=chosen.token.encode() if chosen.token is not None else None,
        told=service.meters.request,
        draining=lambda: service.draining,
        access_log=chosen.access_log,
    )
    handlers: dict[Any, Any] = {
        Problem: answer_problem,
        HTTPException: _answer_http,
        ClientGone: _answer_nobody,
        AttireError: _answer_refused,
    }
    app = Starlette(routes=service.routes(), middleware=[guard], exception_handlers=handlers, lifespan=service.lifespan)
    app.router.redirect_slashes = False  # a redirect is put together from what the client sent
    app.state.service = service
    return app


async def _settle(batches: MicroBatches[Any, Any, Any], sources: Sequence[Any]) -> list[Any]:
    """Answers, with what is wrong with a picture as a Problem. Raises Problem where there is no room or no time."""
    try:
        found = await batches.ask(sources)
    except QueueFull:
        raise busy() from None
    except DeadlineExceeded:
        raise late() from None
    return [not_a_picture(one) if isinstance(one, AttireError) else one for one in found]


async def _while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """What `work` returns; given up, as ClientGone, when the client closes its connection before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _answer_http(_: Request, error: Exception) -> Response:
    """Starlette's own refusals: 404 and 405."""
    assert isinstance(error, HTTPException)
    known = {404: ("path", "there is nothing at this path"), 405: ("method", "this path does not take that method")}
    code, detail = known.get(error.status_code, ("http", "the request cannot be answered"))
    return Problem(error.status_code, code, detail, error.headers).response()


async def _answer_nobody(_: Request, error: Exception) -> Response:
    """The connection is closed: nothing of this is sent; the status is for the log (nginx's number for it)."""
    return Response(status_code=499)


async def _answer_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, AttireError)
    return not_a_picture(error).response()


def _seen_image(data: bytes) -> Seen:
    """The one place where an upload becomes what the model sees. Raises AttireError for what is no sound picture."""
    photo = photos.prepare(data)
    return Seen(photo.image, photo.polarity)


def _explanation(classifier: Classifier, image: NDArray[np.uint8], label: str) -> dict[str, Any]:
    """The one place where an answer is explained: what /explain says beside the prediction."""
    from attire.inference import explain as inference_explain
    from attire.inference.explain import heat_png  # and matplotlib, which nobody waits for who only predicts

    found = inference_explain.explain(classifier, image, label)
    return {
        "heat": data_uri(heat_png(image, found.heat)),
        "method": found.method,
        "neighbours": [
            {"label": one.label, "distance": float(one.distance), "image": data_uri(grey_png(one.image))}
            for one in found.neighbours
        ],
    }


def _shared_copy(classifier: Classifier) -> Classifier:
    """The same weights in modules of its own: explaining hooks into modules while the other thread predicts."""
    shared = {id(tensor): tensor for tensor in (*classifier.model.parameters(), *classifier.model.buffers())}
    own = copy.copy(classifier)
    own.model = copy.deepcopy(classifier.model, shared)
    return own


def _verdict(told: Prediction) -> str:
    """The answer in words. Probabilities are calibrated, so that words may stand for them."""
    if told.out_of_distribution:
        return str(told)
    if told.probability >= 0.9:
        return told.label
    word = "probably" if told.probability >= 0.6 else "perhaps"
    return f"{word} {told.label}; else {told.ranking[1][0]}"


def _model_card(classifier: Classifier, settings: _Settings) -> dict[str, Any]:
    ood_detector = classifier.ood_detector
    return {
        "name": str(classifier.facts.get("name", "unnamed")),
        "version": __version__,
        "classes": list(classifier.classes),
        "temperature": classifier.temperature,
        "image_size": classifier.architecture.image_size,
        "freeze_to": classifier.architecture.end,
        "ood": None if ood_detector is None else ood_detector.about(),
        "facts": {name: classifier.facts[name] for name in _FACTS if name in classifier.facts},
        "limits": {
            "upload_bytes": settings.max_upload,
            "batch_images": settings.most_images,
            "batch_bytes": settings.max_json,
            "queue_images": settings.max_queue,
            "seconds": settings.seconds,
        },
        "media_types": list(PICTURES),
    }


def _read_page() -> Response:
    text = files("attire.server").joinpath("page.html").read_text(encoding="utf-8")
    return _html(text, guards.policy(text))


def _html(text: str, policy: str) -> Response:
    return Response(text, media_type="text/html", headers={"Content-Security-Policy": policy})


def _as_json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
