"""A chat's messages into the text that the model was trained on, by the model's own template.

A template is a program that came with the model. transformers runs it in jinja's
`ImmutableSandboxedEnvironment` and shows it plain data only (no attribute that begins with an underscore,
nothing changed that was passed in).
"""

import json
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from llmboost_worker.text.errors import PromptError, TokenizerError

_now: ContextVar[float | None] = ContextVar("now", default=None)


def render_chat(tokenizer: Any, messages: list[dict[str, Any]], now: float) -> str:
    """The text of a chat, up to and including the beginning of the assistant's next message.

    Args:
        tokenizer: A tokenizer of transformers, which has the template.
        messages: In OpenAI's form.
        now: Unix time that a template may show as today's date. The job's creation, not the clock: a later
            attempt must get the same prompt.

    Raises:
        PromptError: no template, messages that it refuses, or that aren't messages.
    """
    chat = plain_messages(messages)
    if not tokenizer.chat_template:
        raise PromptError(
            "This model has no chat template, so it can't answer messages. Send `prompt` to /v1/completions, "
            "or serve a model that was trained to chat.",
            param="messages",
            code="no_chat_template",
        )
    clock = _now.set(now)
    try:
        template = tokenizer.get_chat_template()
        _prepare(template)
        text: str = tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except ImportError as error:
        raise TokenizerError(f"Chat templates can't be run: {error}") from error
    except PromptError:
        raise
    except Exception as error:  # templates raise what Python raises: TypeError for none + "", ...
        raise PromptError(
            f"The model's chat template refused the messages: {_sentence(error)} "
            "Check the roles, their order, and what each message holds.",
            param="messages",
            code="chat_template_error",
        ) from error
    finally:
        _now.reset(clock)
    return text


def _sentence(error: Exception) -> str:
    """What a template raised, with one full stop at its end."""
    return (str(error) or type(error).__name__).rstrip(". ") + "."


def _prepare(template: str) -> None:
    """Compiles the template, and makes its `strftime_now` tell the time of the job.

    Llama 3's and other templates write today's date. By transformers' own `strftime_now` a job resumed after
    midnight, or in another time zone, would continue another prompt than its first tokens had. There is no
    public way: what is passed to a template is turned into plain data first, so a function can't be.
    """
    from jinja2 import TemplateSyntaxError
    from transformers.utils import chat_template_utils

    try:
        # Cached: the one that will be rendered.
        compiled = chat_template_utils._compile_jinja_template(template)
    except TemplateSyntaxError as error:
        raise PromptError(
            f"This model's chat template is broken, so it can't answer messages: {_sentence(error)} Tell the "
            "operator, or send `prompt` to /v1/completions.",
            param="messages",
            code="broken_chat_template",
        ) from error
    compiled.environment.globals["strftime_now"] = _strftime_now


def _strftime_now(format: str) -> str:
    now = _now.get()  # None: rendered by someone else, who means the clock
    return (datetime.now() if now is None else datetime.fromtimestamp(now, tz=UTC)).strftime(format)


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as templates expect them: every content a string, every tool call's arguments an object.

    Text parts are joined by a newline, as vLLM does for templates that take strings.

    Raises:
        PromptError: not a list of messages, or a content that isn't text.
    """
    if not isinstance(messages, list) or not messages:
        raise PromptError("`messages` is empty; send at least one message.", "messages", "empty_prompt")
    return [_plain_message(message, f"messages[{n}]") for n, message in enumerate(messages)]


def _plain_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise PromptError(
            f"`{where}` is no message: it must be an object with a `role` such as 'user'.",
            param=where,
            code="invalid_message",
        )
    plain = {**message, "content": _plain_content(message, where)}
    if isinstance(message.get("tool_calls"), list):
        plain["tool_calls"] = [_with_object_arguments(call) for call in message["tool_calls"]]
    return plain


def _plain_content(message: dict[str, Any], where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant":  # it called tools and said nothing
        return ""
    if isinstance(content, list):
        return "\n".join(_text_of_part(part, f"{where}.content[{n}]") for n, part in enumerate(content))
    raise PromptError(
        f"`{where}.content` is {_kind(content)}; it must be a string or a list of text parts.",
        param=f"{where}.content",
        code="invalid_content",
    )


def _text_of_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text", "refusal") and isinstance(text, str):
        return text
    raise PromptError(
        f"`{where}` is of type {kind!r}; this model reads text only: "
        'send {"type": "text", "text": "..."} or a plain string.',
        param=where,
        code="unsupported_content",
    )


def _with_object_arguments(call: Any) -> Any:
    """OpenAI writes a call's arguments as a string of JSON; templates write them by `| tojson`, which would
    quote that string once more."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call  # what the model wrote then isn't JSON; show it as it was
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
