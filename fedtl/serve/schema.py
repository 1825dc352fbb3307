"""What OpenAPI says of ``/predict``: one model takes one kind of request."""

from __future__ import annotations

from typing import Any

from fedtl.serve.predictor import MAX_EXAMPLES, Predictor

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                name: {"type": "string"} for name in ("what", "where", "got", "allowed", "do")
            },
            "required": ["what"],
        }
    },
}

REFUSALS = {
    400: "not JSON, or no form",
    408: "came too slowly",
    413: "too long",
    415: "another content type",
    422: "an example that cannot be used",
    503: "too many requests at once; see Retry-After",
}


def describe(predictor: Predictor) -> dict[str, Any]:
    """Arguments of FastAPI's route: summary, answers and request body."""
    prediction = {
        "type": "object",
        "properties": {
            "label": {"type": "string", "enum": list(predictor.labels)},
            "probability": {"type": "number"},
            "probabilities": {"type": "object", "additionalProperties": {"type": "number"}},
        },
    }
    answers: dict[int, Any] = {
        status: {"description": what, "content": {"application/json": {"schema": _ERROR}}}
        for status, what in REFUSALS.items()
    }
    listed = {"type": "array", "items": prediction}
    found = {"type": "object", "properties": {"predictions": listed}}
    answers[200] = {
        "description": "one prediction for each example",
        "content": {"application/json": {"schema": found}},
    }
    return {
        "summary": "Label and probabilities of each example",
        "response_class": _raw(),
        "responses": answers,
        "openapi_extra": {"requestBody": {"required": True, "content": _content(predictor)}},
    }


def _content(predictor: Predictor) -> dict[str, Any]:
    if predictor.kind == "images":
        binary = {"type": "string", "format": "binary"}
        files = {"type": "array", "items": binary, "maxItems": MAX_EXAMPLES}
        return {
            "multipart/form-data": {"schema": {"type": "object", "properties": {"file": files}}},
            "image/*": {"schema": binary},
            "application/octet-stream": {"schema": binary},
        }
    one: dict[str, Any] = {"type": "string", "minLength": 1}
    if predictor.kind == "rows":
        width = int(predictor.preprocessing["width"])
        number = {"type": "number"}
        one = {"type": "array", "items": number, "minItems": width, "maxItems": width}
    listed = {"type": "array", "items": one, "minItems": 1, "maxItems": MAX_EXAMPLES}
    body = {"type": "object", "properties": {predictor.kind: listed}, "required": [predictor.kind]}
    return {"application/json": {"schema": body}}


def _raw() -> Any:
    from fastapi import Response

    return Response
