"""The OpenAPI 3.1 description of the server: every path, every status it can answer with, every body."""

from collections.abc import Sequence
from typing import Any

from attire.server.uploads import PICTURE_TYPES
from attire.version import __version__

_Json = dict[str, Any]

_TEXT = {"type": "string"}
_PNG_URI = {"type": "string", "pattern": "^data:image/png;base64,[A-Za-z0-9+/]+={0,2}$"}
_PROBABILITY = {"type": "number", "minimum": 0, "maximum": 1}
_DISTANCE = {"type": "number", "minimum": 0}

# What each status means.
_STATUSES = {
    400: "Not a request that can be understood.",
    401: "The bearer token is missing or wrong.",
    403: "Asked for by a page of another site.",
    404: "The model has no report.",
    408: "The body did not arrive in time.",
    413: "The body is larger than the limit in /model.",
    415: "Content-Type or Content-Encoding is not supported.",
    421: "The Host header names a host that this server does not answer to.",
    422: "The picture or the list of pictures cannot be used.",
    431: "Request line and headers are larger than 16 kB.",
    500: "Something failed in the server.",
    503: "Too many pictures wait, or the answer took too long; Retry-After says when to try again.",
}
_ALWAYS = (400, 421, 431, 500)
_BODY = (403, 408, 413, 415, 422, 503)


def document(classes: Sequence[str], batch_images: int, token: bool) -> _Json:
    """The description of a server with these classes. batch_images: most in one batch; token: whether one is wanted."""
    secured: _Json = {"security": [{"bearer": []}]} if token else {}
    problems = {f"Problem{code}": _problem(code) for code in _STATUSES}
    components: _Json = {"schemas": _schemas_of(classes, batch_images), "responses": problems}
    if token:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Attire",
            "version": __version__,
            "description": "Names the garment in a picture.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": _paths(len(classes), token),
        "components": components,
        **secured,
    }


def _paths(classes: int, token: bool) -> _Json:
    picture = {"required": True, "content": {name: {"schema": {}} for name in PICTURE_TYPES}}
    batch = {"required": True, "content": {"application/json": {"schema": _ref("Batch")}}}
    top_k: _Json = {
        "name": "top_k",
        "in": "query",
        "description": "How many classes the ranking shows; all by default.",
        "schema": {"type": "integer", "minimum": 1, "maximum": classes},
    }
    page = {"text/html": {"schema": _TEXT}}
    gets = {
        "/": ("page", "The page for people.", page, (), False),
        "/samples": ("samples", "Sample garments.", _of("Samples"), (), token),
        "/model": ("model", "The model's card and the server's limits.", _of("Model"), (), token),
        "/report": ("report", "The model's report, a page.", page, (404,), token),
        "/healthz": ("healthz", "Whether the process answers.", _of("Status"), (), False),
        "/readyz": ("readyz", "Whether it should be sent requests.", _of("Status"), (503,), False),
        "/metrics": ("metrics", "Figures for Prometheus.", {"text/plain": {"schema": _TEXT}}, (), token),
        "/openapi.json": ("openapi", "This document.", {"application/json": {"schema": {"type": "object"}}}, (), False),
    }
    posts = {
        "/predict": ("predict", "The garment in one picture.", picture, _of("Prediction")),
        "/predict/batch": ("predict_batch", "The garments in several pictures.", batch, _of("Predictions")),
        "/explain": ("explain", "One picture, and what the answer rests on.", picture, _of("Explanation")),
    }
    paths: _Json = {}
    for path, (name, summary, content, extra, secured) in gets.items():
        statuses = (*_ALWAYS, *extra, *((401,) if secured else ()))
        paths[path] = {"get": _operation(name, summary, content, statuses, open_to_all=token and not secured)}
    for path, (name, summary, body, content) in posts.items():
        operation = _operation(name, summary, content, (*_ALWAYS, *_BODY, *((401,) if token else ())))
        paths[path] = {"post": {**operation, "parameters": [top_k], "requestBody": body}}
    return paths


def _operation(name: str, summary: str, content: _Json, statuses: Sequence[int], open_to_all: bool = False) -> _Json:
    refusals = {str(code): {"$ref": f"#/components/responses/Problem{code}"} for code in sorted(statuses)}
    success = {"200": {"description": "The answer.", "content": content}}
    operation: _Json = {"operationId": name, "summary": summary, "responses": {**success, **refusals}}
    return {**operation, "security": []} if open_to_all else operation


def _problem(code: int) -> _Json:
    response: _Json = {
        "description": _STATUSES[code],
        "content": {"application/problem+json": {"schema": _ref("Problem")}},
    }
    headers = {401: "WWW-Authenticate", 503: "Retry-After"}
    if name := headers.get(code):
        response["headers"] = {name: {"required": True, "schema": {"type": "string"}}}
    return response


def _schemas_of(classes: Sequence[str], batch_images: int) -> _Json:
    prediction = _prediction_properties(classes)
    neighbour = _record({"label": _TEXT, "distance": _DISTANCE, "image": _PNG_URI})
    explanation = {"heat_map": _PNG_URI, "method": _TEXT, "neighbours": _list_of(neighbour)}
    image = {"type": "string", "contentEncoding": "base64", "description": "A picture, as for /predict."}
    prediction_or_error = {"oneOf": [_ref("Prediction"), _record({"error": _ref("Problem")})]}
    status = {"type": "integer", "minimum": 400, "maximum": 599}
    return {
        "Prediction": _record(prediction),
        "Explanation": _record({**prediction, **explanation}),
        "Predictions": _record({"predictions": _list_of(prediction_or_error, minItems=1)}),
        "Batch": _record({"images": _list_of(image, minItems=1, maxItems=batch_images)}),
        "Samples": _record({"samples": _list_of(_record({"name": _TEXT, "image": _PNG_URI}))}),
        "Model": {"type": "object", "required": ["name", "version", "classes", "temperature", "limits", "media_types"]},
        "Status": _record({"status": {"type": "string", "enum": ["ok", "ready"]}}),
        "Problem": _record({"type": _TEXT, "title": _TEXT, "status": status, "detail": _TEXT, "code": _TEXT}),
    }


def _prediction_properties(classes: Sequence[str]) -> _Json:
    label = {"type": "string", "enum": list(classes)}
    ranked = _record({"label": label, "probability": _PROBABILITY})
    return {
        "label": label,
        "probability": _PROBABILITY,
        "ranking": _list_of(ranked, minItems=1, maxItems=len(classes)),
        "out_of_distribution": {
            "type": ["boolean", "null"],
            "description": "Whether it is rather none of these classes; null where the model has no such detector.",
        },
        "distance": {
            **_DISTANCE,
            "type": ["number", "null"],
            "description": "From the training images, in feature space; null where unknown.",
        },
        "verdict": {"type": "string", "description": "The answer in words."},
        "model_input": {**_PNG_URI, "description": "The picture as the model sees it, 28x28."},
        "polarity": {"type": "string", "enum": ["dark on light", "light on dark"]},
        "milliseconds": {"type": "number", "minimum": 0},
    }


def _list_of(items: _Json, **limits: int) -> _Json:
    return {"type": "array", "items": items, **limits}


def _record(properties: _Json) -> _Json:
    """An object with exactly these members."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _ref(name: str) -> _Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _of(name: str) -> _Json:
    return {"application/json": {"schema": _ref(name)}}
