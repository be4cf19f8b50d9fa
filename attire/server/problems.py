"""What a request is told when it cannot be answered: RFC 9457, application/problem+json."""

import json
from collections.abc import Mapping
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 1


class Problem(Exception):  # noqa: N818  (the standard's word)
    """An answer that is not 2xx; `detail` is for people and names nothing inside the server, `code` for programs."""

    def __init__(self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.headers = status, code, detail, dict(headers or {})

    def to_json(self) -> dict[str, object]:
        title = HTTPStatus(self.status).phrase
        return {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail, "code": self.code}

    def body(self) -> bytes:
        return json.dumps(self.to_json()).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, MEDIA_TYPE)


async def answer_problem(_: Request, problem: Exception) -> Response:
    """Starlette's handler for a Problem that an endpoint raised."""
    assert isinstance(problem, Problem)
    return problem.response()


def busy(detail: str = "as many pictures are waiting as may; try again in a moment") -> Problem:
    return Problem(503, "queue-full", detail, {"Retry-After": str(RETRY_SECONDS)})


def late() -> Problem:
    detail = "no answer within the time a request has; try again in a moment"
    return Problem(503, "deadline", detail, {"Retry-After": str(RETRY_SECONDS)})
