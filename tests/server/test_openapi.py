import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import pytest

from attire.data.dataset import FASHION_CLASSES
from attire.server import openapi, responses
from tests.serving import Fake, Live, picture, running

TOKEN = "0123456789abcdef"
TEXT = base64.b64encode(picture()).decode()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with running(Fake(), max_upload=1000) as found:
        yield found


def schema_of(document: dict[str, Any], answer: httpx.Response, path: str) -> dict[str, Any]:
    """What the document says of this answer's body; a KeyError where it does not know such an answer."""
    told = document["paths"][path][answer.request.method.lower()]["responses"][str(answer.status_code)]
    if "$ref" in told:
        told = document["components"]["responses"][told["$ref"].rpartition("/")[2]]
    for name in told.get("headers", ()):
        assert name in answer.headers
    schema: dict[str, Any] = told["content"][answer.headers["content-type"].partition(";")[0]]["schema"]
    return {**schema, "components": document["components"]}


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/predict", picture(3), {}, 200),
        ("/predict?top_k=0", picture(3), {}, 400),
        ("/predict", b"", {}, 400),
        ("/predict", b"x" * 1001, {}, 413),
        ("/predict", b"x", {"Content-Type": "text/plain"}, 415),
        ("/predict", b"x", {}, 422),
        ("/predict", picture(), {"Origin": "http://evil.example"}, 403),
        ("/predict", picture(), {"Host": "evil.example"}, 421),
        ("/explain", picture(3), {}, 200),
        ("/explain", b"x", {}, 422),
        ("/predict/batch?top_k=2", json.dumps({"images": [TEXT, "eA==", "%"]}).encode(), {}, 200),
        ("/predict/batch", b'{"images": []}', {}, 422),
    ],
)
def test_answers_are_what_the_document_says(
    live: Live, monkeypatch: pytest.MonkeyPatch, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    near = {"label": "Bag", "distance": 1.5, "image": "data:image/png;base64,aaaa"}
    told = {"heat_map": near["image"], "method": "by hand", "neighbours": [near]}
    monkeypatch.setattr(responses, "describe_explanation", lambda *_: told)
    kind = "application/json" if "batch" in path else "image/png"
    answer = live.client.post(path, content=body, headers={"Content-Type": kind, **headers})
    assert answer.status_code == status
    document = live.client.get("/openapi.json").json()
    jsonschema_rs.validate(schema_of(document, answer, path.partition("?")[0]), answer.json())


@pytest.mark.parametrize("path", ["/samples", "/model", "/healthz", "/readyz", "/openapi.json", "/report"])
def test_what_can_be_got_is_what_the_document_says(live: Live, path: str) -> None:
    answer = live.client.get(path)
    document = live.client.get("/openapi.json").json()
    jsonschema_rs.validate(schema_of(document, answer, path), answer.json())


def test_a_server_with_a_token_says_where_it_is_wanted() -> None:
    with running(Fake(), token=TOKEN) as live:
        document = live.client.get("/openapi.json").json()
        answer = live.post(picture())
        assert answer.status_code == 401
        jsonschema_rs.validate(schema_of(document, answer, "/predict"), answer.json())
        for path, methods in document["paths"].items():
            for method, told in methods.items():
                open_to_all = live.client.request(method, path).status_code != 401
                assert (told.get("security") == []) is open_to_all
                assert ("401" in told["responses"]) is not open_to_all


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (one for key, one in value.items() if key == "$ref")
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from references(one)


@pytest.mark.parametrize("token", [False, True])
def test_every_reference_leads_somewhere(token: bool) -> None:
    document = openapi.document(FASHION_CLASSES, 64, token)
    for reference in references(document):
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    assert document["openapi"].startswith("3.1")
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)
