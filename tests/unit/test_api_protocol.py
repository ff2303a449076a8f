"""What a request may say: every refusal names the field, the value and the remedy."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from llmboost.jobs import Prompt
from llmboost_api.errors import ApiError
from llmboost_api.protocol.chat import ChatRequest
from llmboost_api.protocol.completions import CompletionRequest
from llmboost_api.protocol.request import RequestModel
from llmboost_api.protocol.translate import first_error

USER = {"role": "user", "content": "Hi"}


def refusal(model: type[RequestModel], body: dict[str, Any]) -> ApiError:
    with pytest.raises(ValidationError) as raised:
        model.model_validate(body)
    return first_error(raised.value, model)


def chat_refusal(**fields: Any) -> ApiError:
    return refusal(ChatRequest, {"model": "m", "messages": [USER], **fields})


def completion_refusal(**fields: Any) -> ApiError:
    return refusal(CompletionRequest, {"model": "m", "prompt": "Hi", **fields})


WRONG: list[tuple[str, list[Any]]] = [
    ("temperature", [-0.1, 2.1, "1", True, [1], 10**400]),
    ("top_p", [0, 1.1, "1", False]),
    ("top_k", [-2, 1.5, "5", True, 2**31]),
    ("min_p", [-0.1, 1.1]),
    ("seed", [2**63, -(2**63) - 1, 1.0, "1", True]),
    ("n", [0, -1, 129, 1.0, "1", True]),
    ("max_tokens", [-1, 2**31, 1.5, "10", True, 10**30]),
    ("presence_penalty", [-2.1, 2.1, "0"]),
    ("frequency_penalty", [-2.1, 2.1]),
    ("repetition_penalty", [0, -1, 1e-9, 101]),
    ("min_tokens", [-1, "1"]),
    ("stop_token_ids", [[-1], ["1"], 5, [True], [2**31]]),
    ("ignore_eos", [1, "true"]),
    ("include_stop_str_in_output", [0, "yes"]),
    ("stream", [1, "true"]),
    ("stop", [5, [5], [""], "", ["a"] * 17, {"a": 1}, True]),
    ("logit_bias", [{"a": 1}, {"5": 101}, {"5": -101}, {"5": "1"}, {"5": True}, [5], {"-1": 1}, {"²": 1}]),
    ("logit_bias", [{"99999999999": 1}, {"": 1}, {"1.5": 1}, {"5": None}]),
    ("stream_options", [True, "usage", []]),
    ("model", [5, "", ["a"]]),
]


@pytest.mark.parametrize("endpoint", [chat_refusal, completion_refusal])
@pytest.mark.parametrize(("field", "values"), WRONG)
def test_wrong_values_are_refused_by_name(endpoint: Any, field: str, values: list[Any]) -> None:
    """Booleans are no numbers and strings neither; every range has its ends."""
    for value in values:
        error = endpoint(**{field: value})
        assert error.status == 400
        assert error.param is not None
        assert error.param.startswith(field), (value, error.message)
        assert f"'{error.param}'" in error.message
        assert error.code in ("invalid_type", "invalid_value"), (value, error.code)
        assert len(error.message) < 300


def test_the_ends_of_ranges_are_accepted() -> None:
    for fields in (
        {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 1, "seed": -(2**63)},
        {"temperature": 2, "top_p": 1e-9, "top_k": 0, "min_p": 0, "seed": 2**63 - 1, "n": 128},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.01, "stop": ["a"] * 16},
        {"logit_bias": {"0": -100, "2147483647": 100.0}, "max_tokens": 1, "stop_token_ids": [0]},
    ):
        ChatRequest.model_validate({"model": "m", "messages": [USER], **fields})
        CompletionRequest.model_validate({"model": "m", "prompt": "Hi", **fields})


def test_null_is_the_same_as_nothing() -> None:
    """For every field that is known, supported or not; but not for what must be given."""
    known = set(ChatRequest.model_fields) | set(ChatRequest.unsupported)
    body = dict.fromkeys(known - {"model", "messages"})
    assert ChatRequest.model_validate({"model": "m", "messages": [USER], **body}).temperature == 1.0
    known = set(CompletionRequest.model_fields) | set(CompletionRequest.unsupported)
    body = dict.fromkeys(known - {"model", "prompt"})
    assert CompletionRequest.model_validate({"model": "m", "prompt": "Hi", **body}).max_tokens == 16
    for field in ("model", "messages"):
        error = chat_refusal(**{field: None})
        assert (error.code, error.param) == ("missing_required_parameter", field)


UNSUPPORTED: list[tuple[str, Any]] = [
    ("tools", [{"type": "function"}]),
    ("tool_choice", "required"),
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("audio", {"voice": "a"}),
    ("modalities", ["text", "audio"]),
    ("prediction", {"type": "content"}),
    ("web_search_options", {}),
    ("reasoning_effort", "low"),
    ("parallel_tool_calls", True),
    ("verbosity", "low"),
]


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(field: str, value: Any) -> None:
    error = chat_refusal(**{field: value})
    assert (error.status, error.code, error.param) == (400, "unsupported_parameter", field)
    assert field in error.message


@pytest.mark.parametrize("tier", ["priority", "fast", "scale"])
def test_a_service_tier_that_is_not_there_is_refused_by_name(tier: str) -> None:
    error = chat_refusal(service_tier=tier)
    assert (error.status, error.code, error.param) == (400, "unsupported_value", "service_tier")
    assert tier in error.message
    assert chat_refusal(service_tier="gold").code == "invalid_value"


def test_what_changes_nothing_is_accepted() -> None:
    neutral = {
        "user": "me",
        "metadata": {"a": {"b": [1]}},
        "store": False,
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "service_tier": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tools": [],
        "functions": [],
        "tool_choice": "none",
        "stream": True,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    }
    ChatRequest.model_validate({"model": "m", "messages": [USER], **neutral})
    body = {"model": "m", "prompt": "Hi", "best_of": 2, "n": 2, "suffix": "", "user": "me"}
    CompletionRequest.model_validate(body)


def test_false_is_not_zero_and_zero_is_not_false() -> None:
    assert chat_refusal(store=0).param == "store"


def test_unknown_fields_are_refused_with_a_guess() -> None:
    error = chat_refusal(max_token=5)
    assert (error.code, error.param) == ("unknown_parameter", "max_token")
    assert "Did you mean 'max_tokens'?" in error.message
    assert chat_refusal(best_of=1).code == "unknown_parameter"
    assert len(chat_refusal(**{"x" * 100_000: 1}).message) < 300


CHAT_PROBLEMS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "empty"),
    ({"messages": "Hi"}, "messages", "a list"),
    ({"messages": ["Hi"]}, "messages[0]", "an object"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "'system'"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "missing"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "text parts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
        "image_url",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content", "null"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content", "part 0"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
        "messages[0].content",
        "'x'",
    ),
    ({"messages": [{**USER, "mood": "good"}]}, "messages[0].mood", "not a parameter"),
    ({"messages": [{**USER, "tool_call_id": "1"}]}, "messages[0].tool_call_id", "'tool'"),
    ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id", "missing"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "max_completion_tokens"),
    ({"top_logprobs": 3}, "top_logprobs", "'logprobs'"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"logprobs": 5}, "logprobs", "true or false"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "'max_tokens'"),
    ({"min_tokens": 9, "max_completion_tokens": 8}, "min_tokens", "'max_completion_tokens'"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "'stream'"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
        "true or false",
    ),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not a parameter"),
]


@pytest.mark.parametrize(("fields", "param", "says"), CHAT_PROBLEMS)
def test_chat_problems(fields: dict[str, Any], param: str, says: str) -> None:
    error = chat_refusal(**fields)
    assert error.param == param
    assert says in error.message
    json.loads(error.body())


COMPLETION_PROBLEMS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": []}, "prompt", "empty list"),
    ({"prompt": 5}, "prompt", "list of token ids"),
    ({"prompt": [[]]}, "prompt", "prompt 0"),
    ({"prompt": [1, "a"]}, "prompt", '"a"'),
    ({"prompt": ["a", 1]}, "prompt", "prompt 1"),
    ({"prompt": [1, -1]}, "prompt", "-1"),
    ({"prompt": [1, True]}, "prompt", "true"),
    ({"prompt": [True]}, "prompt", "true"),
    ({"prompt": [2**31]}, "prompt", "2147483648"),
    ({"prompt": None}, "prompt", "missing"),
    ({"prompt": ["a"] * 65, "n": 2}, "prompt", "65 prompts"),
    ({"max_tokens": 0}, "max_tokens", "'echo'"),
    ({"logprobs": True}, "logprobs", "an integer"),
    ({"logprobs": 21}, "logprobs", "at most 20"),
    ({"best_of": 2}, "best_of", "'n' is 1"),
    ({"best_of": True}, "best_of", "true"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"messages": [USER]}, "messages", "not a parameter"),
    ({"min_tokens": 17}, "min_tokens", "16"),
]


@pytest.mark.parametrize(("fields", "param", "says"), COMPLETION_PROBLEMS)
def test_completion_problems(fields: dict[str, Any], param: str, says: str) -> None:
    error = completion_refusal(**fields)
    assert error.param == param
    assert says in error.message


def test_messages_as_templates_take_them() -> None:
    """A conversation with tool calls keeps them; what a client received it may send back."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    received = {
        "role": "assistant",
        "content": "Hello",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    messages = [
        {"role": "system", "content": ""},
        received,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "1"},
    ]
    asked = ChatRequest.model_validate({"model": "m", "messages": messages})
    assert asked.prompts()[0] == Prompt(
        messages=[
            {"role": "system", "content": ""},
            {"role": "assistant", "content": "Hello"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
        ]
    )
