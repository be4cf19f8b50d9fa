"""The app: predictions, explanations, the model's card, health and metrics over HTTP. Plain ASGI; it opens no socket.

No path and no address from a request is ever opened: pictures arrive in bodies, and every other answer is made at the
start.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from importlib.resources import files
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from attire.errors import AttireError
from attire.inference.classifier import Classifier
from attire.server import openapi, responses
from attire.server.content_policy import page_policy
from attire.server.guards import Guard
from attire.server.metrics import MEDIA_TYPE
from attire.server.problems import Problem, queue_full
from attire.server.responses import Answer
from attire.server.service import Predictor, Service
from attire.server.settings import Settings
from attire.server.uploads import (
    JSON_TYPES,
    PICTURE_TYPES,
    BodyLimits,
    ClientGone,
    check_headers,
    not_a_picture,
    parse_batch,
    whole_body,
)

_Result = TypeVar("_Result")
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"  # the page shows it in a frame
)


def create_app(classifier: Classifier, predictor: Predictor | None = None, **settings: Any) -> Starlette:
    """An ASGI app that answers with this classifier; `settings` are the fields of `Settings`.

    predictor: predicts in the classifier's place, being the same model in another runtime; the classifier explains.
    `app.state.service.start_draining()` makes the app say that it is not ready any more.
    """
    service = Service(classifier, predictor or classifier, Settings(**settings))
    chosen = service.settings
    guard = Middleware(
        Guard,
        hosts=frozenset(host.lower() for host in chosen.hosts),
        token=chosen.token.encode() if chosen.token is not None else None,
        on_response=service.metrics.observe_request,
        draining=lambda: service.draining,
        access_log=chosen.access_log,
    )
    handlers: dict[Any, Any] = {
        Problem: _answer_problem,
        HTTPException: _answer_http_exception,
        ClientGone: _answer_nobody,
        AttireError: _answer_attire_error,
    }
    app = Starlette(
        routes=_Endpoints(service).routes(),
        middleware=[guard],
        exception_handlers=handlers,
        lifespan=lambda _: service.run(),
    )
    app.router.redirect_slashes = False  # a redirect is put together from what the client sent
    app.state.service = service
    return app


class _Endpoints:
    """What each path answers."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        self._service, self._settings = service, settings
        self._class_count = len(service.classifier.classes)
        self._picture_limits = BodyLimits(settings.max_upload, settings.stall_seconds, settings.body_seconds)
        self._batch_limits = BodyLimits(settings.max_json, settings.stall_seconds, settings.body_seconds)
        self._page = _read_page()

    def routes(self) -> list[Route]:
        classifier, settings = self._service.classifier, self._settings
        api = openapi.document(classifier.classes, settings.batch_images, settings.token is not None)
        return [
            Route("/", self.get_page),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/predict/batch", self.predict_batch, methods=["POST"]),
            Route("/explain", self.explain, methods=["POST"]),
            Route("/samples", _constant(responses.describe_samples())),
            Route("/model", _constant(responses.describe_model(classifier, settings))),
            Route("/report", self.get_report),
            Route("/healthz", _constant({"status": "ok"})),
            Route("/readyz", self.readyz),
            Route("/metrics", self.get_metrics),
            Route("/openapi.json", _constant(api)),
        ]

    async def predict(self, request: Request) -> Response:
        top_k = self._top_k(request)
        answer, start = await self._predict_body(request)
        return _json_response(responses.describe_answer(answer, start, top_k))

    async def explain(self, request: Request) -> Response:
        top_k = self._top_k(request)
        if not self._service.explanations.has_room():
            raise queue_full()
        answer, start = await self._predict_body(request)
        explanation = await _while_connected(request, self._service.explain(answer))
        return _json_response({**responses.describe_answer(answer, start, top_k), **explanation})

    async def predict_batch(self, request: Request) -> Response:
        top_k, service = self._top_k(request), self._service
        check_headers(request, JSON_TYPES, self._settings.max_json)
        if not service.predictions.has_room():
            raise queue_full()
        async with whole_body(request, self._batch_limits, service.uploads) as body:
            start = time.perf_counter()
            pictures = await asyncio.to_thread(parse_batch, body, self._settings.batch_images)
            uploads = [picture for picture in pictures if isinstance(picture, bytes)]
            answers = iter(await _while_connected(request, service.predict(uploads)))
        outcomes = [next(answers) if isinstance(picture, bytes) else picture for picture in pictures]
        return _json_response({"predictions": [_describe_outcome(outcome, start, top_k) for outcome in outcomes]})

    async def get_page(self, _: Request) -> Response:
        return self._page

    async def get_report(self, _: Request) -> Response:
        if self._settings.report is None:
            raise Problem(404, "report", "this model has no report")
        return _html_response(self._settings.report, _REPORT_POLICY)

    async def get_metrics(self, _: Request) -> Response:
        return Response(self._service.metrics.text(), headers={"Content-Type": MEDIA_TYPE})

    async def readyz(self, _: Request) -> Response:
        if self._service.draining:
            raise Problem(503, "draining", "the server is about to stop", {"Retry-After": "5"})
        return _json_response({"status": "ready"})

    async def _predict_body(self, request: Request) -> tuple[Answer, float]:
        """The answer for the picture in the body, and when the whole body had arrived."""
        check_headers(request, PICTURE_TYPES, self._settings.max_upload)
        if not self._service.predictions.has_room():
            raise queue_full()
        async with whole_body(request, self._picture_limits, self._service.uploads) as body:
            start = time.perf_counter()
            (answer,) = await _while_connected(request, self._service.predict([body]))
        if isinstance(answer, Exception):
            raise answer
        return answer, start

    def _top_k(self, request: Request) -> int:
        """How many classes the ranking shows: all, or what the query says."""
        given = request.query_params.getlist("top_k")
        if not given:
            return self._class_count
        text = given[0]
        if len(given) > 1 or not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= self._class_count):
            raise Problem(400, "top_k", f"top_k is given once, as a whole number from 1 to {self._class_count}")
        return int(text)


def _describe_outcome(outcome: Answer | Exception, start: float, top_k: int) -> dict[str, Any]:
    """One place in the answer to /predict/batch. Raises what is neither an answer nor the picture's own problem."""
    if isinstance(outcome, Answer):
        return responses.describe_answer(outcome, start, top_k)
    if isinstance(outcome, Problem):
        return {"error": outcome.to_json()}
    raise outcome


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


async def _answer_problem(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem.response()


async def _answer_http_exception(_: Request, error: Exception) -> Response:
    """Starlette's own refusals: 404 and 405."""
    assert isinstance(error, HTTPException)
    known = {404: ("path", "there is nothing at this path"), 405: ("method", "this path does not take that method")}
    code, detail = known.get(error.status_code, ("http", "the request cannot be answered"))
    return Problem(error.status_code, code, detail, error.headers).response()


async def _answer_nobody(_: Request, error: Exception) -> Response:
    """The connection is closed: nothing of this is sent; the status is for the log (nginx's number for it)."""
    return Response(status_code=499)


async def _answer_attire_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, AttireError)
    return not_a_picture(error).response()


def _constant(content: Any) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that answers this JSON, whatever is asked."""
    response = _json_response(content)

    async def get(_: Request) -> Response:
        return response

    return get


def _json_response(content: Any) -> Response:
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return Response(body, media_type="application/json")


def _read_page() -> Response:
    text = files("attire.server").joinpath("page.html").read_text(encoding="utf-8")
    return _html_response(text, page_policy(text))


def _html_response(text: str, policy: str) -> Response:
    return Response(text, media_type="text/html", headers={"Content-Security-Policy": policy})
