"""GET on a completion's id: what can be had, what can't, and what it says then."""

from urllib.parse import quote

import pytest
from arq.connections import ArqRedis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmboost import keys
from llmboost.jobs import new_id
from llmboost.streams import SEAL_ID
from llmboost_api import generation, patience

from .answers import check_error, events, frames_of, id_in, last_id
from .api_pod import (
    CHAT,
    COMPLETIONS,
    RETRY,
    WORDS,
    RunningPod,
    ScriptedWorker,
    ends,
    fails,
    says,
    serving,
    settings_for,
    streamed,
)

# Whole


async def test_the_whole_answer_can_be_fetched(
    redis_url: str, pod: RunningPod, worker: ScriptedWorker
) -> None:
    """Without `stream` a GET is answered as the POST was, streamed or not; official clients can ask."""
    for path, shown in ((CHAT, "chat.completion"), (COMPLETIONS, "text_completion")):
        posted = await pod.http.post(path, json=streamed(path, stream=False))
        async with serving(settings_for(redis_url)) as other:
            fetched = await other.http.get(f"{path}/{posted.json()['id']}")
        assert fetched.content == posted.content
        assert fetched.headers["x-request-id"] == posted.json()["id"]
        text = (await pod.http.post(path, json=streamed(path))).text
        fetched = await pod.http.get(f"{path}/{id_in(text)}", params={"stream": "false"})
        assert (fetched.json()["object"], fetched.json()["id"]) == (shown, id_in(text))
    completion = await pod.openai.chat.completions.retrieve(worker.jobs[0].id)
    assert completion.choices[0].message.content == "".join(WORDS)


async def test_an_answer_that_failed_fails_again(pod: RunningPod, worker: ScriptedWorker) -> None:
    """With the status that it had; nothing is to be gained by asking once more."""
    worker.script = lambda job: [fails("Too long.", status=400, code="c")]
    posted = await pod.http.post(CHAT, json=streamed(CHAT, stream=False))
    for query in ({}, {"stream": "true"}):
        fetched = await pod.http.get(f"{CHAT}/{posted.headers['x-request-id']}", params=query)
        assert (fetched.status_code, fetched.content) == (400, posted.content)
        assert fetched.headers["x-should-retry"] == "false"


async def test_several_prompts_are_read_from_the_beginning(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Their frames carry no ids, so a GET brings all of them, and refuses to go on in the middle."""
    body = streamed(COMPLETIONS, prompt=["a", "b"], n=2, stream_options={"include_usage": True})
    unbroken = (await pod.http.post(COMPLETIONS, json=body)).text
    assert last_id(events(unbroken)) is None
    again = await pod.rest(COMPLETIONS, id_in(unbroken))
    assert sorted(events(again)) == sorted(events(unbroken))
    assert events(again)[-2:] == events(unbroken)[-2:]
    whole = (await pod.http.get(f"{COMPLETIONS}/{id_in(unbroken)}")).json()
    assert [choice["text"] for choice in whole["choices"]] == ["".join(WORDS)] * 4
    response = await pod.http.get(
        f"{COMPLETIONS}/{id_in(unbroken)}", params={"stream": "true", "starting_after": "1-1"}
    )
    assert "2 prompts" in check_error(response, 400, "invalid_cursor", "starting_after")
    part = await pod.http.get(f"{COMPLETIONS}/{id_in(unbroken)}-1")
    check_error(part, 404, "completion_not_found", "completion_id")


async def test_what_has_ended_is_read_after_its_deadline_too(
    pod: RunningPod, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline is that of the generation; its answer stays for the retention."""
    unbroken = (await pod.http.post(CHAT, json=streamed(CHAT))).text
    monkeypatch.setattr(generation, "now", lambda: 1e12)
    assert await pod.rest(CHAT, id_in(unbroken)) == unbroken


# What can't be had


async def test_another_keys_completion_is_not_found(redis_url: str, worker: ScriptedWorker) -> None:
    """An id is no credential; and what is another's looks like what never was."""
    async with serving(settings_for(redis_url, api_key=("mine", "theirs"))) as pod:
        mine, theirs = ({"authorization": f"Bearer {key}"} for key in ("mine", "theirs"))
        posted = await pod.http.post(CHAT, json=streamed(CHAT, stream=False), headers=mine)
        url = f"{CHAT}/{posted.json()['id']}"
        assert (await pod.http.get(url, headers=mine)).content == posted.content
        for query in ({}, {"stream": "true"}, {"stream": "true", "starting_after": SEAL_ID}):
            response = await pod.http.get(url, params=query, headers=theirs)
            message = check_error(response, 404, "completion_not_found", "completion_id")
            assert "API key" in message
        check_error(await pod.http.get(url), 401, "missing_api_key")


async def test_ids_that_never_were(pod: RunningPod, worker: ScriptedWorker) -> None:
    """404, and at the wrong endpoint the right one is named."""
    posted = await pod.http.post(COMPLETIONS, json=streamed(COMPLETIONS, stream=False))
    completion_id = posted.json()["id"]
    message = check_error(
        await pod.http.get(f"{CHAT}/{completion_id}"), 404, "completion_not_found", "completion_id"
    )
    assert f"{COMPLETIONS}/" in message
    for unknown in ("chatcmpl-123", "x" * 5000, "%00", "chatcmpl-%F0%9F%98%80", new_id("req")):
        response = await pod.http.get(f"{CHAT}/{unknown}")
        message = check_error(response, 404, "completion_not_found", "completion_id")
        assert len(message) < 300


async def test_what_has_expired_is_gone(pod: RunningPod, worker: ScriptedWorker, redis: ArqRedis) -> None:
    """410, for an id of ours whose stream is not there any more, whatever else is asked."""
    text = (await pod.http.post(CHAT, json=streamed(CHAT))).text
    await redis.delete(keys.stream(id_in(text)))
    for query in ({}, {"stream": "true"}, {"stream": "true", "starting_after": SEAL_ID}):
        response = await pod.http.get(f"{CHAT}/{id_in(text)}", params=query)
        told = check_error(response, 410, "completion_expired", "completion_id")
        assert "not kept any more" in told
        assert "2592000 s" in told


async def test_after_the_last_frame_there_is_no_content(pod: RunningPod, worker: ScriptedWorker) -> None:
    """204 ends a browser's EventSource, which otherwise connects again for ever; after an error too."""
    for end in (ends(), fails()):
        worker.script = lambda job, end=end: [*says(WORDS), end]
        text = (await pod.http.post(CHAT, json=streamed(CHAT))).text
        assert last_id(events(text)) == SEAL_ID
        response = await pod.http.get(
            f"{CHAT}/{id_in(text)}", params={"stream": "true"}, headers={"last-event-id": SEAL_ID}
        )
        assert (response.status_code, response.content) == (204, b"")


async def test_the_header_wins_over_the_query(pod: RunningPod, worker: ScriptedWorker) -> None:
    """An EventSource connects again to the URL that it was made with, which may name an earlier place."""
    text = (await pod.http.post(CHAT, json=streamed(CHAT))).text
    url = f"{CHAT}/{id_in(text)}?stream=true&starting_after=1-1"
    resumed = await pod.http.get(url, headers={"last-event-id": "1-3"})
    assert resumed.text.removeprefix(RETRY) == "".join(events(text)[3:])
    resumed = await pod.http.get(url, headers={"last-event-id": ""})
    assert resumed.text.removeprefix(RETRY) == "".join(events(text)[1:])


async def test_places_that_are_not_in_the_stream(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Each is refused with the name of what was wrong, before anything is sent."""
    text = (await pod.http.post(CHAT, json=streamed(CHAT))).text
    url = f"{CHAT}/{id_in(text)}"
    for after in ("1-99", "7-0", "0-0", "1-1.1", "1-5.2", f"{SEAL_ID}.1", "nonsense", "1-1-1", "9" * 400):
        response = await pod.http.get(url, params={"stream": "true"}, headers={"last-event-id": after})
        check_error(response, 400, "invalid_cursor", "Last-Event-ID")
        response = await pod.http.get(url, params={"stream": "true", "starting_after": after})
        assert after[:40] in check_error(response, 400, "invalid_cursor", "starting_after")
    response = await pod.http.get(url, params={"starting_after": "1-1"})
    assert "stream=true" in check_error(response, 400, "invalid_cursor", "starting_after")
    check_error(await pod.http.get(url, params={"stream": "maybe"}), 400, "invalid_value", "stream")
    response = await pod.http.get(url, params={"stream": "true", "starting-after": "1-1"})
    check_error(response, 400, "unknown_parameter", "starting-after")


async def test_a_post_does_not_go_on_with_anything(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Libraries that connect again by posting again would take a new answer for the rest of the old one."""
    for path in (CHAT, COMPLETIONS):
        response = await pod.http.post(path, json=streamed(path), headers={"last-event-id": "1-3"})
        message = check_error(response, 400, "invalid_cursor", "Last-Event-ID")
        assert f"GET {path}/" in message
    assert not worker.jobs


async def test_without_redis_it_is_503(
    pod: RunningPod, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a 404 that a client would believe."""

    async def refuses(job_id: str, entry_id: str) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)
    streams = pod.server.config.app.state.pod.streams  # type: ignore[union-attr]
    monkeypatch.setattr(streams, "find", refuses)
    response = await pod.http.get(f"{CHAT}/{new_id('chatcmpl')}", params={"stream": "true"})
    check_error(response, 503, "service_unavailable")
    assert response.headers["retry-after"]
    response = await pod.http.get(
        f"{CHAT}/{new_id('chatcmpl')}?stream=true", headers={"accept": "text/event-stream"}
    )
    # An EventSource would give up at a 503. This ends, and it connects again, with the last id it had.
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    (frame,) = frames_of(response.text)
    assert (frame.id, frame.json["error"]["code"]) == (None, "service_unavailable")


async def test_nothing_that_is_asked_breaks_it(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Any id, any place, any query: a stream, or an error of the client's."""
    text = (await pod.http.post(CHAT, json=streamed(CHAT))).text
    ours = id_in(text)
    number = st.integers(0, 3) | st.integers(0, 2**70)
    places = (
        st.text(max_size=20)
        | st.builds("{}-{}".format, number, number)
        | st.builds("{}-{}.{}".format, number, number, number)
        | st.sampled_from([SEAL_ID, f"{SEAL_ID}.1", "1-5.1", "1-1"])
    )
    latin = st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=20)
    # One for each status that may come; what hypothesis adds is different every time.
    examples: list[tuple[str, dict[str, str], bytes | None]] = [
        (ours, {"stream": "true"}, b"1-1"),
        (ours, {"stream": "true"}, SEAL_ID.encode()),
        (ours, {"stream": "maybe"}, None),
        ("nobody's", {"stream": "true"}, None),
    ]

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.just(ours) | st.just(ours) | st.text(min_size=1, max_size=40),
        st.dictionaries(st.sampled_from(["starting_after", "x"]), places, max_size=1),
        st.sampled_from(["true", "false", "1", ""]) | st.text(max_size=5),
        st.none() | places.filter(str.isascii).filter(str.isprintable).map(str.encode)
        | latin.map(lambda text: text.encode("latin-1")),
    )  # fmt: skip
    def collect(completion_id: str, query: dict[str, str], stream: str, header: bytes | None) -> None:
        examples.append((completion_id, {"stream": stream, **query}, header))

    collect()
    statuses = set()
    for completion_id, query, header in examples:
        headers = [] if header is None else [(b"last-event-id", header.strip())]
        url = f"{CHAT}/{quote(completion_id, safe='')}"
        response = await pod.http.get(url, params=query, headers=headers)
        statuses.add(response.status_code)
        assert response.status_code < 500, (completion_id, query, header, response.text)
        if response.status_code >= 400:
            assert response.json()["error"]["message"]
        elif query["stream"].lower() in ("true", "1") and response.status_code == 200:
            assert text.endswith(response.text.removeprefix(RETRY))
    assert {200, 400, 404} <= statuses
