"""Request bodies: limits while they arrive, the media types, and the pictures of a batch."""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.requests import Request

from attire.errors import AttireError
from attire.server.problems import RETRY_SECONDS, Problem

PICTURES = ("image/png", "image/jpeg", "image/webp", "image/bmp")
JSON = ("application/json",)


class ClientGone(Exception):  # noqa: N818
    """Nobody is left who would read the answer."""


@dataclass
class Arrivals:
    """Bytes of bodies held at this moment by all requests together, so that many uploads cannot fill the memory."""

    limit: int
    held: int = 0

    def take(self, count: int) -> None:
        if self.held + count > self.limit:
            detail = "too many uploads are arriving; try again in a moment"
            raise Problem(503, "uploads-full", detail, {"Retry-After": str(RETRY_SECONDS)})
        self.held += count


@dataclass(frozen=True)
class BodyLimits:
    """most: bytes; stall: seconds between two parts; whole: seconds from the first to the last."""

    most: int
    stall: float
    whole: float


def check_headers(request: Request, media_types: tuple[str, ...], most: int) -> None:
    """Raises Problem for what the headers alone rule out, before a byte of the body is read."""
    headers = request.headers
    told = headers.getlist("content-type")
    media_type = told[0].partition(";")[0].strip().lower() if len(told) == 1 else ""
    if media_type not in media_types:
        wanted = ", ".join(media_types)
        raise Problem(415, "media-type", f"send it as Content-Type {wanted}", {"Accept": wanted})
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Problem(415, "content-encoding", "send it without Content-Encoding", {"Accept-Encoding": "identity"})
    length = headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > most:
        raise _too_large(most)


@asynccontextmanager
async def whole_body(request: Request, limits: BodyLimits, arrivals: Arrivals) -> AsyncIterator[bytes]:
    """The body, which counts among the arrivals until the end of the block.

    Raises Problem where it is empty, too large or too slow, ClientGone where it breaks off.
    """
    parts: list[bytes] = []
    size, more = 0, True
    try:
        try:
            async with asyncio.timeout(limits.whole):
                while more:
                    async with asyncio.timeout(limits.stall):
                        message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part, more = message.get("body", b""), message.get("more_body", False)
                    if size + len(part) > limits.most:
                        raise _too_large(limits.most)
                    arrivals.take(len(part))
                    size += len(part)
                    parts.append(part)
        except TimeoutError:
            raise Problem(408, "slow-body", "the body did not arrive in time", {"Connection": "close"}) from None
        if not size:
            raise Problem(400, "empty-body", "the body is empty")
        yield parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        arrivals.held -= size


def _too_large(most: int) -> Problem:
    return Problem(413, "body-too-large", f"the body may have {most:,} bytes at most")


def not_a_picture(error: AttireError) -> Problem:
    """Without `where`: that may hold what a decoder said, with names from inside it."""
    return Problem(422, "picture", f"{error.what}; {error.do}" if error.do else error.what)


def parse_batch(body: bytes, most: int) -> list[bytes | Problem]:
    """The pictures of `{"images": [base64, ...]}` in their order; what is not base64 is a Problem in its place.

    Raises Problem for any other document.
    """
    try:
        found = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Problem(400, "json", "the body is not JSON") from None
    if not isinstance(found, dict) or set(found) != {"images"} or not isinstance(found["images"], list):
        raise Problem(422, "batch", 'expected {"images": [base64, ...]} and nothing else')
    images: list[Any] = found["images"]
    if not 1 <= len(images) <= most:
        raise Problem(422, "batch-size", f"expected 1 to {most} images, found {len(images):,}")
    if not all(isinstance(image, str) for image in images):
        raise Problem(422, "batch", "expected every image as a string of base64")
    return [_decode_base64(image) for image in images]


def _decode_base64(text: str) -> bytes | Problem:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return Problem(422, "base64", "not base64")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)
