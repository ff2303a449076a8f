"""Pydantic's errors in the words of an API: which field, what value, what to do."""

import json
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmboost_api.errors import ApiError
from llmboost_api.protocol.request import RequestModel

SHOWN = 60
"""Characters of a value that an error repeats."""

_TYPES = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def first_error(invalid: ValidationError, model: type[RequestModel]) -> ApiError:
    """The first thing that is wrong, as a 400."""
    error = invalid.errors(include_url=False)[0]
    within = error.get("ctx", {}).get("param")
    param = _path((*error["loc"], within) if within else error["loc"])
    code, message = _explain(error, param, model)
    return ApiError(400, message, code=code, param=param or None)


def _explain(error: ErrorDetails, param: str, model: type[RequestModel]) -> tuple[str, str]:
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "api_error":
        return context["code"], f"'{param}' {context['message']}"
    if kind == "unsupported":
        given = shown(context["given"])
        return (
            "unsupported_parameter",
            f"'{param}' is not supported by this server (given: {given}). Remove it from the request.",
        )
    if kind == "missing":
        return "missing_required_parameter", f"'{param}' is missing: add it to the request."
    if kind == "extra_forbidden":
        return _unknown(error["loc"], param, model)
    if kind in _TYPES:
        return "invalid_type", f"'{param}' must be {_TYPES[kind]}, not {shown(value)}."
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return "invalid_value", f"'{param}' is {shown(value)}, but it must be {words} {_bound(context[key])}."
    if kind == "literal_error":
        return "invalid_value", f"'{param}' is {shown(value)}, but it must be {context['expected']}."
    if kind == "too_short":
        return "invalid_value", f"'{param}' is empty: it needs at least {context['min_length']}."
    if kind == "too_long":
        return (
            "invalid_value",
            f"'{param}' has too many entries: at most {context['max_length']} are allowed.",
        )
    if kind == "string_too_short":
        return "invalid_value", f"'{param}' is an empty string: give it a value or leave it out."
    return "invalid_value", f"'{param}' is {shown(value)}: {error['msg']}."


def _bound(limit: float) -> str:
    """To the last digit: `:g` alone would round a large one."""
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _unknown(loc: tuple[int | str, ...], param: str, model: type[RequestModel]) -> tuple[str, str]:
    closest = model.closest(str(loc[-1])) if len(loc) == 1 else None
    hint = f" Did you mean '{closest}'?" if closest else " Remove it from the request."
    return "unknown_parameter", f"'{param}' is not a parameter that this server knows.{hint}"


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content`, as OpenAI writes it."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]":
            path += f".{_clip(part)}" if path else _clip(part)
    return path


def shown(value: Any) -> str:
    """A value in an error: enough of it to recognise, never all of a large one."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"an object with {_clip(', '.join(map(repr, value)))}" if value else "an empty object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, str):
        return f"the string {json.dumps(_clip(value), ensure_ascii=False)}"
    if isinstance(value, bool):
        return str(value).lower()
    return _clip(str(value))


def _clip(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
