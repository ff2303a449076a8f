"""The app's own description. Bodies are read by `llmboost_api.body`, so FastAPI has to be told of them."""

from typing import Any, get_args

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from llmboost_api.protocol.batches import BatchRequest
from llmboost_api.protocol.chat import ChatRequest
from llmboost_api.protocol.completions import CompletionRequest
from llmboost_api.protocol.files import HOUR_S, MONTH_S, Purpose
from llmboost_api.protocol.request import RequestModel

MODELS: tuple[type[RequestModel], ...] = (BatchRequest, ChatRequest, CompletionRequest)
_REF = "#/components/schemas/{model}"

ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def body_of(model: type[RequestModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "What was wrong, and what to do.",
        "content": {"application/json": {"schema": ERROR_SCHEMA}},
    },
}

ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or a stream of chunks if `stream` is true.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    },
    **ERRORS,
}

ANSWERS_AGAIN: dict[int | str, dict[str, Any]] = {
    **ANSWERS,
    204: {"description": "The whole stream has been received already: nothing follows."},
}

OBJECT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The object.", "content": {"application/json": {"schema": {"type": "object"}}}},
    "4XX": ANSWERS["4XX"],
}

CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The bytes of the file.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    "4XX": ANSWERS["4XX"],
}

FILE_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(get_args(Purpose))},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": HOUR_S, "maximum": MONTH_S},
                    },
                    "required": ["file", "purpose"],
                }
            }
        },
    }
}


def install(app: FastAPI) -> None:
    """Makes `app.openapi()` name the models of request bodies."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _, definitions = models_json_schema(
                [(model, "validation") for model in MODELS], ref_template=_REF
            )
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components.update(definitions["$defs"])
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # FastAPI's own errors, which are never sent
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]
