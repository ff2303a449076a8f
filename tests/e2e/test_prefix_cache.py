"""What requests have in common is computed once, and the usage says how much of it was there."""

from tests.e2e.asking import ask, chat, completion, text_of
from tests.e2e.system import MODEL, System
from tests.waiting import wait_until

BLOCK = 16
"""Tokens that are cached together."""


async def test_usage_tells_what_was_cached(system: System) -> None:
    """The same request again: all but the end of its prompt, whatever the endpoint, streamed or not; with
    several choices, once. The answer is the same."""
    body = completion("the prefix cache is asked " * 20, max_tokens=5, temperature=0)
    async with system.async_http() as http, system.async_openai() as client:
        first, second = await ask(http, body), await ask(http, body)
        assert text_of(first) == text_of(second)
        tokens = first["usage"]["prompt_tokens"]
        assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        cached = (tokens - 1) // BLOCK * BLOCK
        assert cached > BLOCK
        assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
        several = await ask(http, {**body, "n": 3, "temperature": 1, "seed": 1})
        assert several["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
        usage = None
        async for chunk in await client.completions.create(
            **body, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == cached


async def test_the_next_turn_finds_the_last(system: System) -> None:
    """A conversation, as the client sends it again and as the server remembers it."""
    question = "What is kept of a conversation? " * 5
    async with system.async_openai() as client:
        answer = await client.responses.create(model=MODEL, input=question, max_output_tokens=40, store=True)
        assert answer.usage is not None
        further = await client.responses.create(
            model=MODEL, previous_response_id=answer.id, input="And then?", max_output_tokens=4
        )
        assert further.usage is not None
        assert further.usage.input_tokens_details.cached_tokens >= answer.usage.input_tokens // BLOCK * BLOCK


async def test_readiness_tells_of_the_cache(system: System) -> None:
    """How many blocks there are, and what was found in them, as of the worker's last heartbeat."""
    async with system.async_http() as http:
        await ask(http, chat("Is it ready? " * 10, max_tokens=1))
        await ask(http, chat("Is it ready? " * 10, max_tokens=1))

        async def told() -> bool:
            workers = (await http.get("/ready")).json()["workers"]
            return any(one["cached_tokens"] > 0 and one["prompt_tokens"] > 0 for one in workers)

        await wait_until(told)
        [worker, *_] = (await http.get("/ready")).json()["workers"]
        assert 0 <= worker["blocks_used"] < worker["blocks_total"]
