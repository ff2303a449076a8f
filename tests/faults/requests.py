"""The requests of the load: a fixed pool in which greedy and seeded sampling, chats and plain completions,
several choices, logprobs, stop strings and penalties are mixed."""

from typing import Any

from tests.e2e.asking import chat, completion

THINGS = ("a fox", "the sea", "an old clock", "two friends", "snow", "a robot", "bread", "a lost key")
OPENINGS = ("Once upon a time", "The sky was", "Tom had a", "In the morning,", "Nobody knew why")


def request(number: int, tokens: int = 90) -> dict[str, Any]:
    """The pool's request of that number, about so many tokens long."""
    thing = THINGS[number % len(THINGS)]
    opening = f"{OPENINGS[number % len(OPENINGS)]} {thing}"
    size = {"max_tokens": tokens + number * 7 % 30, "ignore_eos": True}
    body = (
        completion(opening, **size)
        if number % 3 == 0
        else chat(f"Tell me a story about {thing} and the number {number}.", **size)
    )
    return {**body, **_sampling(number), **_extras(number, body)}


REPORT = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 40, "maxLength": 80},
        "animals": {"type": "array", "items": {"enum": ["fox", "bird"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["title", "animals"],
    "additionalProperties": False,
}


def report(number: int) -> dict[str, Any]:
    """One for JSON that fits `REPORT`: some hundred tokens, for the demo model is fond of whitespace. Greedy
    and seeded ones go by pairs: even numbers ask one pod, odd ones the other."""
    return {
        **chat(f"Tell me about {THINGS[number % len(THINGS)]} and the number {number}.", max_tokens=800),
        "response_format": {"type": "json_schema", "json_schema": {"name": "report", "schema": REPORT}},
        **({"temperature": 0} if number % 4 < 2 else {"temperature": 1.0, "seed": number}),
    }


def _sampling(number: int) -> dict[str, Any]:
    if number % 2 == 0:
        return {"temperature": 0}
    return {
        "seed": 1000 + number,
        "temperature": (0.7, 1.0, 1.3)[number % 3],
        **({"top_p": 0.9} if number % 5 == 1 else {}),
        **({"top_k": 40} if number % 5 == 2 else {}),
        **({"min_p": 0.02} if number % 5 == 3 else {}),
    }


def _extras(number: int, body: dict[str, Any]) -> dict[str, Any]:
    is_chat = "messages" in body
    match number % 10:
        case 1:
            return {"n": 2}
        case 2 | 7:
            return {"logprobs": True, "top_logprobs": 2} if is_chat else {"logprobs": 2}
        case 3:
            return {"stop": [" happy", "\n\n\n", "the end"]}
        case 4:
            return {"frequency_penalty": 0.4, "presence_penalty": 0.2}
        case 5:
            return {"repetition_penalty": 1.1, "stream_options": {"include_usage": True}}
        case 6:
            return {"ignore_eos": False}
        case 8:
            return {"n": 2, "temperature": 1.0, "seed": number}
    return {}
