"""The answer to a request that cannot be served: RFC 9457, application/problem+json."""

import json
from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"
_RETRY_SECONDS = 1


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


def queue_full() -> Problem:
    return try_again("queue-full", "as many pictures are waiting as may")


def try_again(code: str, reason: str) -> Problem:
    """503, for what may succeed a moment later."""
    return Problem(503, code, f"{reason}; try again in a moment", {"Retry-After": str(_RETRY_SECONDS)})
