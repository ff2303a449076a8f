"""Prompts into ids: what the model was trained on, or an error that says what to change."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmboost.jobs import Prompt
from llmboost_worker.text import PromptError, PromptTooLong, Tokenizer, encode_prompt, render_prompt
from llmboost_worker.text.template import plain_messages
from tests.unit.text_tokenizers import byte_level, byte_level_of_transformers, token_id

HELLO = [{"role": "user", "content": "Hello"}]


def with_template(template: str | None) -> Tokenizer:
    return Tokenizer(byte_level_of_transformers(template))


def error_of(tokenizer: Tokenizer, prompt: Prompt) -> PromptError:
    with pytest.raises(PromptError) as raised:
        encode_prompt(tokenizer, prompt)
    return raised.value


def test_messages_are_rendered_and_end_where_the_answer_begins() -> None:
    """The template writes the special tokens; the tokenizer adds none of its own."""
    tokenizer = byte_level()
    ids = encode_prompt(tokenizer, Prompt(messages=HELLO))
    assert render_prompt(tokenizer, Prompt(messages=HELLO)) == "<|user|>Hello<|end|><|assistant|>"
    assert ids == [
        token_id(tokenizer, "<|user|>"),
        *tokenizer.encode("Hello", False),
        token_id(tokenizer, "<|end|>"),
        token_id(tokenizer, "<|assistant|>"),
    ]


@pytest.mark.parametrize("add", [True, False])
def test_text_gets_special_tokens_as_asked(add: bool) -> None:
    """`add_special_tokens` decides whether the tokenizer writes its own."""
    ids = encode_prompt(byte_level(), Prompt(text="Hello", add_special_tokens=add))
    assert (ids[0] == token_id(byte_level(), "<|begin|>")) is add
    assert render_prompt(byte_level(), Prompt(text="Hello")) == byte_level().decode(ids) == "Hello"


def test_token_ids_pass_as_they_are() -> None:
    """Ids are taken as given, up to the model's vocabulary even where the tokenizer's is smaller."""
    size = byte_level().vocab_size
    assert encode_prompt(byte_level(), Prompt(token_ids=[0, 5, size - 1])) == [0, 5, size - 1]
    assert encode_prompt(byte_level(), Prompt(token_ids=[size]), vocab_size=size + 1) == [size]
    ids = byte_level().encode("Hello 你好", False)
    assert render_prompt(byte_level(), Prompt(token_ids=ids)) == "Hello 你好"


@pytest.mark.parametrize("bad", [-1, 10**6, 2**70, True, 1.0, "5", None])
def test_ids_outside_the_vocabulary_are_refused(bad: Any) -> None:
    """An id that would break the engine never reaches it; the message names it and its place."""
    error = error_of(byte_level(), Prompt(token_ids=[1, bad]))
    assert (error.param, error.code) == ("prompt", "invalid_token_id")
    assert "Token 1" in error.message
    assert repr(bad) in error.message


def test_text_whose_ids_the_model_lacks_is_refused() -> None:
    """A tokenizer larger than the model's embedding is an error of that prompt, not the end of the engine."""
    with pytest.raises(PromptError, match="model's token ids"):
        encode_prompt(byte_level(), Prompt(text="Hello"), vocab_size=3)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (Prompt(), "prompt"),
        (Prompt(text="", add_special_tokens=False), "prompt"),
        (Prompt(token_ids=[]), "prompt"),
        (Prompt(messages=[]), "messages"),
    ],
)
def test_an_empty_prompt_is_refused(prompt: Prompt, param: str) -> None:
    """There is nothing to continue."""
    error = error_of(byte_level(), prompt)
    assert (error.param, error.code) == (param, "empty_prompt")


@pytest.mark.parametrize(
    "prompt", [Prompt(text="ab\ud83d"), Prompt(messages=[{"role": "user", "content": "\ude00 ab"}])]
)
def test_half_a_surrogate_pair_is_refused(prompt: Prompt) -> None:
    """JSON can carry one; UTF-8 can't."""
    error = error_of(byte_level(), prompt)
    assert error.code == "invalid_text"
    assert "\\ud" in error.message


def test_a_model_without_a_template_says_so() -> None:
    """The client is told which endpoint does work."""
    error = error_of(with_template(None), Prompt(messages=HELLO))
    assert (error.param, error.code) == ("messages", "no_chat_template")
    assert "/v1/completions" in error.message


def test_a_template_that_is_no_program_is_not_blamed_on_the_messages() -> None:
    for template in ("{% for %}", "{{ messages[0].content }", "{% if true %}"):
        error = error_of(with_template(template), Prompt(messages=HELLO))
        assert (error.param, error.code) == ("messages", "broken_chat_template")
        assert "Tell the operator" in error.message


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("{{ none + 'text' }}", "NoneType"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_that_raises_is_the_prompts_error(template: str, says: str) -> None:
    """Whatever a template raises, the worker goes on and the client reads why."""
    error = error_of(with_template(template), Prompt(messages=HELLO))
    assert (error.param, error.code) == ("messages", "chat_template_error")
    assert says in error.message


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ range(10000000) | list }}",
        "{{ '%s' | format(messages) | attr('__class__') }}",
    ],
)
def test_templates_run_in_a_sandbox(template: str) -> None:
    """A template came with the model and may be hostile: it can't reach Python, nor change what it is
    given."""
    messages = [dict(HELLO[0])]
    raised: PromptError | None = None
    text = ""
    try:
        text = render_prompt(with_template(template), Prompt(messages=messages))
    except PromptError as error:
        raised = error
    assert text == ""  # an unsafe attribute may read as undefined
    assert raised is None or raised.code == "chat_template_error"
    assert messages == HELLO


def test_the_date_is_that_of_the_job() -> None:
    """An attempt on the next day gets the prompt that the first one had, in any time zone."""
    tokenizer = with_template("{{ strftime_now('%d %b %Y %H:%M') }} {{ messages[0].content }}")
    prompt = Prompt(messages=HELLO)
    assert render_prompt(tokenizer, prompt, now=1767225540.0) == "31 Dec 2025 23:59 Hello"
    assert encode_prompt(tokenizer, prompt, now=1767225540.0) == tokenizer.encode(
        "31 Dec 2025 23:59 Hello", False
    )
    assert render_prompt(tokenizer, prompt, now=1767225600.0) == "01 Jan 2026 00:00 Hello"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        ([{"type": "text", "text": "one"}], "one"),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        ([], ""),
    ],
)
def test_text_parts_become_one_string(content: Any, text: str) -> None:
    """Templates take strings; a list of text parts is the same text."""
    assert plain_messages([{"role": "user", "content": content}])[0]["content"] == text


def test_an_assistant_that_only_called_tools_said_nothing() -> None:
    """Content that is null or missing is "", and what else the message has stays."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    for message in [{"content": None}, {}]:
        plain = plain_messages([{"role": "assistant", "tool_calls": [call], "name": "n", **message}])[0]
        assert (plain["content"], plain["name"]) == ("", "n")
        assert plain["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert call["function"]["arguments"] == '{"x": 1}'


@pytest.mark.parametrize("arguments", ["{not json", "[1]", "3", ""])
def test_arguments_that_are_no_object_stay_as_they_were(arguments: str) -> None:
    """The model wrote them; the template shows them."""
    call = {"function": {"name": "f", "arguments": arguments}}
    plain = plain_messages([{"role": "assistant", "content": "", "tool_calls": [call, "odd"]}])[0]
    assert plain["tool_calls"] == [call, "odd"]


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ("text", "messages[1]", "invalid_message"),
        ({"content": "text"}, "messages[1]", "invalid_message"),
        ({"role": "user"}, "messages[1].content", "invalid_content"),
        ({"role": "user", "content": 3}, "messages[1].content", "invalid_content"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            "messages[1].content[1]",
            "unsupported_content",
        ),
        ({"role": "user", "content": ["text"]}, "messages[1].content[0]", "unsupported_content"),
    ],
)
def test_what_is_no_text_message_is_refused_by_place(message: Any, param: str, code: str) -> None:
    """The error names the message and the part."""
    error = error_of(byte_level(), Prompt(messages=[*HELLO, message]))
    assert (error.param, error.code) == (param, code)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_content_is_rendered_or_refused_never_worse(text: str) -> None:
    """Whatever a user writes, the prompt holds it or the error is a PromptError."""
    assert text in render_prompt(byte_level(), Prompt(messages=[{"role": "user", "content": text}]))
    encode_prompt(byte_level(), Prompt(messages=[{"role": "user", "content": text}]))


def test_a_prompt_far_beyond_the_context_is_not_encoded() -> None:
    """Megabytes that can't fit are refused by their beginning, with a length that they surely have; a prompt
    that is a little too long is still counted to the token, and one that fits is untouched."""
    context = 10
    huge = Prompt(text="word " * 1_000_000)
    tokenizer = byte_level()
    encoded: list[int] = []
    encode = tokenizer.encode
    tokenizer.encode = lambda text, add: encoded.append(len(text)) or encode(text, add)  # type: ignore[method-assign]
    try:
        with pytest.raises(PromptTooLong) as raised:
            encode_prompt(tokenizer, huge, context=context)
        assert sum(encoded) < 1000
        assert context < raised.value.at_least <= 4_000_000
        near = Prompt(text="word " * 12)
        assert encode_prompt(tokenizer, near, context=context) == encode_prompt(tokenizer, near)
    finally:
        del tokenizer.encode  # type: ignore[method-assign]
