"""`llmboost bench`: what is read of a stream, however the network cuts it."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from llmboost.cli.bench.events import Events, message_in

CHAT = (
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    b": ping\n"
    b'id: 7-1\ndata: {"choices":[{"index":0,"delta":{"content":"Hi \\u00e9"}}],"usage":null}\n\n'
    b'data:{"choices":[{"index":0,"delta":{"content":" there\\n\\ndata: no frame"}}]}\r\n\r\n'
    b'data: {"choices":[{"index":0,"delta":{"reasoning_content":"hm"}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":12,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
    b"data: [DONE]\n\n"
)


@given(st.lists(st.integers(0, len(CHAT)), max_size=40))
def test_any_cut_gives_the_same_counts(places: list[int]) -> None:
    cuts = sorted({0, *places, len(CHAT)})
    events = Events()
    chunks = sum(events.feed(CHAT[a:b]) for a, b in itertools.pairwise(cuts)) + events.finish()
    assert chunks == 3
    assert events.is_complete
    assert events.error is None
    assert events.usage is not None
    assert (events.usage.prompt_tokens, events.usage.completion_tokens) == (9, 12)
    assert events.usage.cached_tokens == 4


def test_a_last_line_needs_no_line_break() -> None:
    events = Events()
    assert events.feed(b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}') == 0
    assert not events.is_complete
    assert events.finish() == 1
    assert events.is_complete


def test_neither_text_nor_a_reason_to_finish_is_no_end() -> None:
    events = Events()
    events.feed(b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n')
    assert not events.is_complete


def test_an_error_in_the_stream_is_in_its_own_words() -> None:
    events = Events()
    events.feed(b'data: {"error": {"message": "the engine failed", "type": "server_error"}}\n\n')
    assert events.error == "the engine failed"


def test_what_is_no_chunk_is_shown_and_not_raised() -> None:
    for payload in (b"{nonsense", b"\xff\xfe", b'{"choices": 3}', b"[]"):
        events = Events()
        assert events.feed(b"data: " + payload + b"\n\n") == 0
        assert events.error is not None
        assert "a chunk that is not OpenAI's" in events.error


def test_messages_of_errors_in_every_servers_form() -> None:
    assert message_in(b'{"error": {"message": "no model", "code": 404}}') == "no model"
    assert message_in(b'{"detail": "Unexpected fields"}') == "Unexpected fields"
    assert message_in(b'{"object": "error", "message": "too long"}') == "too long"
    assert message_in(b'{"error": "plain"}') == "plain"
    assert message_in(b"<html>\n  Bad gateway") == "<html> Bad gateway"
    assert message_in(b'{"detail": [{"loc": ["body"]}]}') == '{"detail": [{"loc": ["body"]}]}'
