"""What every request model shares: strict types, and fields refused by name instead of ignored."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

Neutral = Callable[[Any], bool]
"""Whether a value of an unsupported field changes nothing, so that it may be dropped."""


def only(*values: Any) -> Neutral:
    """These values, of the same type, change nothing."""
    return lambda given: any(type(given) is type(value) and given == value for value in values)


def always(_: Any) -> bool:
    """No value changes anything."""
    return True


def never(_: Any) -> bool:
    """Every value but null asks for something."""
    return False


def problem(code: str, message: str, param: str = "") -> PydanticCustomError:
    """An error for the client; `code` is OpenAI's. The message follows the name of the field.

    `param`: from a validator of a whole model, the field that is meant.
    """
    return PydanticCustomError("api_error", "{message}", {"message": message, "code": code, "param": param})


class RequestModel(BaseModel):
    """Numbers are not strings, booleans are not numbers, and null is the same as not given."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    unsupported: ClassVar[Mapping[str, Neutral]] = {}
    """Fields of OpenAI's that are not supported here, and when they may be dropped all the same."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                if value is not None:
                    kept[name] = value
            elif name in cls.unsupported:
                if value is not None and not cls.unsupported[name](value):
                    raise PydanticCustomError("unsupported", "", {"param": name, "given": value})
            else:
                kept[name] = value
        return kept

    @classmethod
    def closest(cls, name: str) -> str | None:
        """The field that a misspelt name may have meant."""
        return next(iter(difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.75)), None)
