"""What may be issued through the SDK becomes requests; anything else is refused before any of it is sent."""

from typing import Any

import pytest

from llmboost.jobs import Prompt
from llmboost.sdk.inputs import FormattedPrompt, parse

CHAT = [{"role": "user", "content": "Hello!"}]


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("Once", Prompt(text="Once")),
        (FormattedPrompt("<s>Once"), Prompt(text="<s>Once", add_special_tokens=False)),
        (FormattedPrompt("<s>Once") + " upon", Prompt(text="<s>Once upon", add_special_tokens=False)),
        ({"prompt": FormattedPrompt("<s>")}, Prompt(text="<s>", add_special_tokens=False)),
        (CHAT, Prompt(messages=CHAT)),
        ({"messages": CHAT}, Prompt(messages=CHAT)),
        (
            [
                {
                    "role": "developer",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                }
            ],
            Prompt(messages=[{"role": "system", "content": "a\nb"}]),
        ),
    ],
)
def test_one_input(given: Any, prompt: Prompt) -> None:
    """A prompt, a rendered prompt and a chat each become what a worker takes."""
    (request,) = parse(given, {})
    assert request.prompt == prompt
    assert request.id is None


def test_a_list_is_of_inputs_unless_it_is_a_chat() -> None:
    """Inputs of all kinds may be mixed; a chat in the list is one of them."""
    requests = parse(["a", CHAT, {"id": "x", "prompt": "b"}, {"id": 7, "messages": CHAT}], {})
    assert [request.prompt.text for request in requests] == ["a", None, "b", None]
    assert [request.id for request in requests] == [None, None, "x", 7]


def test_an_input_overrides_the_defaults() -> None:
    """What is given nowhere has OpenAI's default."""
    defaults = {"temperature": 0.5, "max_tokens": 100, "stop": "END"}
    plain, own = parse(["a", {"prompt": "b", "temperature": 0, "stop": ["x", "y"], "seed": 3}], defaults)
    assert (plain.sampling.temperature, plain.sampling.stop, plain.sampling.top_p) == (0.5, ("END",), 1.0)
    assert (own.sampling.temperature, own.sampling.stop, own.sampling.max_tokens) == (0.0, ("x", "y"), 100)
    assert own.sampling.seed == 3


def test_each_input_has_a_seed_of_its_own_unless_it_is_given_one() -> None:
    """The same prompt twice is two different draws."""
    one, other = parse(["a", "a"], {})
    assert one.sampling.seed != other.sampling.seed
    one, other = parse(["a", "a"], {"seed": 5})
    assert one.sampling.seed == other.sampling.seed == 5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (7, "of type int"),
        (None, "None"),
        ([], "empty"),
        ([7], "input 0 is of type int"),
        (["a", {"prompt": "b", "temprature": 1}], "input 1: unknown parameter 'temprature'; did you mean"),
        ({"prompt": "b", "temperature": 5}, "temperature is 5: .* less than or equal to 2"),
        ({"prompt": "b", "temperature": float("nan")}, "temperature is nan"),
        ({"prompt": "b", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "b", "stop": [""]}, "stop"),
        ({"prompt": "b", "min_tokens": 9, "max_tokens": 3}, "min_tokens is 9, more than max_tokens, 3"),
        ({"prompt": "b", "top_logprobs": 3}, "top_logprobs"),
        ({"prompt": "b", "messages": CHAT}, "one of them"),
        ({"id": 3}, "one of them"),
        ({"id": 1.5, "prompt": "b"}, "its id is of type float"),
        ({"role": "user", "content": "b"}, "put it into a list"),
        ({"messages": []}, "at least one"),
        ({"messages": "hello"}, "a chat is a list"),
        ([{"role": "user", "content": None}], "its content is None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only parts of the form"),
        ("half \ud83d", "half of a character"),
        ([{"role": "user", "content": "\ud83d"}], "half of a character"),
        ([{"role": "user", "content": "a", "x": object()}], "object"),
    ],
)
def test_anything_else_is_refused(given: Any, words: str) -> None:
    """The error says which input, what is wrong with it and with what value."""
    with pytest.raises(ValueError, match=words):
        parse(given, {})
