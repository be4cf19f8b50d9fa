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
from attire.server.problems import Problem, try_again

PICTURE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp")
JSON_TYPES = ("application/json",)


class ClientGone(Exception):  # noqa: N818
    """The client has closed its connection: nobody would read the answer."""


@dataclass
class UploadBudget:
    """Bytes of the bodies that all requests together hold now, so that many uploads cannot fill the memory."""

    limit: int
    used: int = 0

    def reserve(self, count: int) -> None:
        """Raises Problem where so many more bytes would exceed the limit."""
        if self.used + count > self.limit:
            raise try_again("uploads-full", "too many uploads are arriving")
        self.used += count


@dataclass(frozen=True)
class BodyLimits:
    """Of one body. stall_seconds: between two of its parts; total_seconds: from the first part to the last."""

    max_bytes: int
    stall_seconds: float
    total_seconds: float


def check_headers(request: Request, media_types: tuple[str, ...], max_bytes: int) -> None:
    """Raises Problem for what the headers alone rule out, before a byte of the body is read."""
    headers = request.headers
    given = headers.getlist("content-type")
    media_type = given[0].partition(";")[0].strip().lower() if len(given) == 1 else ""
    if media_type not in media_types:
        wanted = ", ".join(media_types)
        raise Problem(415, "media-type", f"send it as Content-Type {wanted}", {"Accept": wanted})
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Problem(415, "content-encoding", "send it without Content-Encoding", {"Accept-Encoding": "identity"})
    length = headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)


@asynccontextmanager
async def whole_body(request: Request, limits: BodyLimits, budget: UploadBudget) -> AsyncIterator[bytes]:
    """The body, which takes its part of the budget until the end of the block.

    Raises Problem where the body is empty, too large or too slow, ClientGone where it breaks off.
    """
    parts: list[bytes] = []
    size, more = 0, True
    try:
        try:
            async with asyncio.timeout(limits.total_seconds):
                while more:
                    async with asyncio.timeout(limits.stall_seconds):
                        message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part, more = message.get("body", b""), message.get("more_body", False)
                    if size + len(part) > limits.max_bytes:
                        raise _too_large(limits.max_bytes)
                    budget.reserve(len(part))
                    size += len(part)
                    parts.append(part)
        except TimeoutError:
            raise Problem(408, "slow-body", "the body did not arrive in time", {"Connection": "close"}) from None
        if not size:
            raise Problem(400, "empty-body", "the body is empty")
        yield parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        budget.used -= size


def _too_large(max_bytes: int) -> Problem:
    return Problem(413, "body-too-large", f"the body may have {max_bytes:,} bytes at most")


def not_a_picture(error: AttireError) -> Problem:
    """The Problem for this error, without its `where`: a decoder's message there may name what is inside the server."""
    return Problem(422, "picture", f"{error.what}; {error.do}" if error.do else error.what)


def parse_batch(body: bytes, max_images: int) -> list[bytes | Problem]:
    """The pictures of `{"images": [base64, ...]}` in their order; what is not base64 is a Problem in its place.

    Raises Problem for any other document.
    """
    try:
        batch = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Problem(400, "json", "the body is not JSON") from None
    if not isinstance(batch, dict) or set(batch) != {"images"} or not isinstance(batch["images"], list):
        raise Problem(422, "batch", 'expected {"images": [base64, ...]} and nothing else')
    images: list[Any] = batch["images"]
    if not 1 <= len(images) <= max_images:
        raise Problem(422, "batch-size", f"expected 1 to {max_images} images, found {len(images):,}")
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
