"""What may be asked through the SDK, checked and turned into requests."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llmboost.jobs import Prompt, SamplingParams, new_seed

Id = str | int
"""What an output names its input by: the caller's own `id`, or 0, 1, 2, … in the order of issue."""

_INT32 = 2**31 - 1

Count = Annotated[int, Field(ge=0, le=_INT32)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1)]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class SamplingOptions(BaseModel):
    """The names and ranges of sampling parameters: defaults of an `LLMBoost`, or overrides of an input."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=_INT32)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    logit_bias: dict[Count, Annotated[float, Field(ge=-100, le=100)]] = {}
    max_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    min_tokens: Count = 0
    stop: Annotated[tuple[Stop, ...], BeforeValidator(_as_tuple), Field(max_length=16)] = ()
    stop_token_ids: Annotated[tuple[Count, ...], Field(max_length=128)] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False

    def params(self) -> SamplingParams:
        """As a job carries them; without a seed, with a fresh one."""
        given = self.model_dump()
        given["seed"] = new_seed() if self.seed is None else self.seed
        given["top_k"] = max(self.top_k, 0)
        return SamplingParams(**given)


SAMPLING_NAMES = frozenset(SamplingOptions.model_fields)
_INPUT_NAMES = SAMPLING_NAMES | {"id", "prompt", "messages"}


class FormattedPrompt(str):
    """A prompt that a model's chat template has rendered, special tokens included: none are added again."""

    __slots__ = ()

    def __add__(self, other: str) -> "FormattedPrompt":
        return FormattedPrompt(str(self) + other)


@dataclass(frozen=True, slots=True)
class Request:
    """One input, checked."""

    id: Id | None
    """None: the caller gave none."""
    prompt: Prompt
    sampling: SamplingParams


def parse(inputs: Any, defaults: Mapping[str, Any]) -> list[Request]:
    """The requests in what a caller issues: one input or a list of them.

    An input is a prompt (a string), a chat (a list of messages), or a dict with `prompt` or `messages`,
    perhaps an `id`, and sampling parameters that override `defaults`.

    Raises:
        ValueError: something is wrong with it; says where. Nothing of it is to be issued.
    """
    if isinstance(inputs, str | Mapping) or _is_chat(inputs):
        return [_request(inputs, defaults, "the input")]
    if not isinstance(inputs, Iterable):
        raise ValueError(f"an input is a string, a list of messages or a dict, not {_kind(inputs)}")
    requests = [_request(each, defaults, f"input {number}") for number, each in enumerate(inputs)]
    if not requests:
        raise ValueError("there is no input in an empty list")
    return requests


def options(values: Mapping[str, Any], where: str) -> SamplingOptions:
    """Checks sampling parameters.

    Raises:
        ValueError: one is unknown, of another type or out of range.
    """
    for name in values.keys() - SAMPLING_NAMES:
        raise ValueError(f"{where}: {unknown(name, _INPUT_NAMES)}")
    try:
        checked = SamplingOptions(**values)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}") from None
    if checked.max_tokens is not None and checked.min_tokens > checked.max_tokens:
        raise ValueError(
            f"{where}: min_tokens is {checked.min_tokens}, more than max_tokens, {checked.max_tokens}"
        )
    return checked


def unknown(name: object, known: Iterable[str]) -> str:
    """What to say of a name that means nothing here."""
    close = difflib.get_close_matches(str(name), known, 1)
    return f"unknown parameter {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def explain(error: ValidationError) -> str:
    """What is wrong with which value, in one line."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc']))} is {problem['input']!r}: {problem['msg'].lower()}"
        for problem in error.errors(include_url=False)
    )


def chat(messages: Any, where: str = "messages") -> list[dict[str, Any]]:
    """A chat's messages as the model's template takes them.

    Raises:
        ValueError: they are not messages with text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f'{where}: a chat is a list of {{"role": …, "content": …}}, at least one')
    checked = [_message(each, f"{where}: message {number}") for number, each in enumerate(messages)]
    _check_encodable(checked, where)
    return checked


def _is_chat(inputs: Any) -> bool:
    return (
        isinstance(inputs, list | tuple)
        and bool(inputs)
        and all(isinstance(each, Mapping) and "role" in each for each in inputs)
    )


def _request(each: Any, defaults: Mapping[str, Any], where: str) -> Request:
    if not isinstance(each, Mapping):
        return Request(None, _prompt(each, where), options(defaults, where).params())
    if "role" in each:
        raise ValueError(f"{where} is a single message: put it into a list to make it a chat")
    if ("prompt" in each) == ("messages" in each):
        raise ValueError(f"{where} needs a 'prompt' or 'messages', one of them")
    given_id = each.get("id")
    if given_id is not None and (isinstance(given_id, bool) or not isinstance(given_id, str | int)):
        raise ValueError(f"{where}: its id is {_kind(given_id)}, but must be a string or an integer")
    if "prompt" in each:
        prompt = _prompt(each["prompt"], where)
    else:
        prompt = Prompt(messages=chat(each["messages"], where))
    overrides = {name: value for name, value in each.items() if name not in ("id", "prompt", "messages")}
    return Request(given_id, prompt, options({**defaults, **overrides}, where).params())


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        text = str(value)
        _check_encodable(text, where)
        return Prompt(text=text, add_special_tokens=not isinstance(value, FormattedPrompt))
    if _is_chat(value):
        return Prompt(messages=chat(value, where))
    raise ValueError(f"{where} is {_kind(value)}: a prompt is a string, a chat is a list of messages")


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} must be a dict with a 'role' and a 'content'")
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "\n".join(_part(part, where) for part in content)
    if not isinstance(content, str) and not message.get("tool_calls"):
        raise ValueError(f"{where}: its content is {_kind(content)}, but must be text")
    # `developer` is OpenAI's newer word, which templates don't know.
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": content or ""}


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise ValueError(f'{where}: only parts of the form {{"type": "text", "text": …}} are supported')
    return text


def _check_encodable(value: Any, where: str) -> None:
    try:
        msgspec.msgpack.encode(value)
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise ValueError(f"{where}: {half!a} alone is half of a character; send whole ones") from None
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from None


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
