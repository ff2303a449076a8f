"""Responses after their request: in the background, at other pods, cancelled, deleted, kept, listed."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from arq.connections import ArqRedis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import APIError, NotFoundError

from llmboost import keys
from llmboost.entries import GAP
from llmboost.queue import JobQueue
from llmboost.registry import ModelCard, Registry, WorkerCard
from llmboost_api.answer import Answer
from llmboost_api.protocol.form import decode_form
from tests.waiting import wait_until

from .answers import check_error
from .api_pod import (
    CHAT,
    MODEL,
    WORDS,
    RunningPod,
    ScriptedWorker,
    chat,
    loses,
    serving,
    settings_for,
)
from .responses import (
    DONE,
    EVENTS,
    RESPONSES,
    Paused,
    ask,
    check_items,
    check_response,
    events_in,
    get,
    kinds,
    rest,
    stream_of,
    text_of,
)

STORY = "".join(WORDS)


@pytest.fixture
def paused(worker: ScriptedWorker) -> Paused:
    worker.script = Paused()
    return worker.script


@pytest.fixture
async def other(redis_url: str, worker: ScriptedWorker) -> AsyncIterator[RunningPod]:
    """A second pod."""
    async with serving(settings_for(redis_url)) as running:
        yield running


# In the background


async def test_in_the_background_it_is_queued_at_once(
    pod: RunningPod, other: RunningPod, worker: ScriptedWorker, paused: Paused
) -> None:
    """Nobody need read it; and any pod says how far it has come."""
    response = await pod.openai.responses.create(model=MODEL, input="Hello", background=True)
    assert (response.status, response.background, response.output) == ("queued", True, [])
    check_response(response.to_dict(mode="python"))
    await wait_until(lambda: len(worker.jobs) == 1)
    assert not worker.jobs[0].needs_audience

    async def has_begun() -> bool:
        now = await get(other, response.id)
        return now.status == "in_progress" and now.output_text == "".join(WORDS[:2])

    await wait_until(has_begun)
    paused.go.set()
    await wait_until(lambda: worker.finished == 1)
    final = await other.openai.responses.retrieve(response.id)
    assert (final.status, final.output_text) == ("completed", STORY)


async def test_a_client_that_leaves_ends_nothing(
    redis_url: str, pod: RunningPod, worker: ScriptedWorker, paused: Paused
) -> None:
    """Streamed in the background at one pod, which goes: the rest comes from another, the same events that
    an unbroken reader gets."""
    async with serving(settings_for(redis_url, grace=0.2)) as first:
        stream = await first.openai.responses.create(model=MODEL, input="Hello", background=True, stream=True)
        had = []
        async for event in stream:
            had.append(event)
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        response_id = had[0].response.id
        unbroken = asyncio.create_task(rest(first, response_id))
        await wait_until(lambda: first.generations)
        paused.go.set()
        unbroken_events = events_in((await unbroken).text)
    again = await pod.openai.responses.retrieve(
        response_id, stream=True, starting_after=had[-1].sequence_number
    )
    had += [event async for event in again]
    assert [event.to_dict() for event in had] == [event.data for event in unbroken_events]
    assert kinds(unbroken_events)[:3] == ["created", "queued", "in_progress"]
    async with pod.openai.responses.stream(response_id=response_id, starting_after=3) as helper:
        assert [event.sequence_number async for event in helper] == list(range(4, len(had)))
        assert (await helper.get_final_response()).output_text == STORY


async def test_every_call_at_another_pod(pod: RunningPod, other: RunningPod, worker: ScriptedWorker) -> None:
    """With the official client: create, retrieve, list, follow, cancel, delete."""
    one, two = pod.openai.responses, other.openai.responses
    first = await one.create(model=MODEL, input="Hello")
    assert await two.retrieve(first.id) == first
    items = await one.input_items.list(first.id)
    assert items.data[0].content[0].text == "Hello"
    second = await two.create(model=MODEL, input="Go on", previous_response_id=first.id, stream=True)
    last = [event async for event in second][-1]
    assert last.response.previous_response_id == first.id
    assert await one.cancel(last.response.id) == await two.retrieve(last.response.id)
    await one.delete(last.response.id)
    with pytest.raises(NotFoundError):
        await two.retrieve(last.response.id)


async def test_a_pod_that_goes_says_where_to_go_on(
    redis_url: str, pod: RunningPod, worker: ScriptedWorker, paused: Paused
) -> None:
    """What ends the stream is raised by the official client, and is none of the response's events."""
    async with serving(settings_for(redis_url, drain_timeout=0.1)) as going:
        stream = await going.openai.responses.create(model=MODEL, input="Hello", stream=True)
        had = [await anext(stream) for _ in range(6)]
        going.server.should_exit = True
        with pytest.raises(APIError) as raised:
            await anext(stream)
    assert raised.value.code == "server_shutdown"
    rest_of = asyncio.create_task(rest(pod, had[0].response.id, had[-1].sequence_number))
    await wait_until(lambda: pod.generations)
    paused.go.set()
    assert [event.number for event in events_in((await rest_of).text)] == list(range(6, 13))


# Going on


async def test_after_any_event_the_rest_comes(
    pod: RunningPod, other: RunningPod, worker: ScriptedWorker
) -> None:
    """At another pod, by the query or by what an EventSource sends; after the last there is nothing."""
    text = await stream_of(pod, store=False)
    events = events_in(text)
    response_id = events[0].data["response"]["id"]
    url = f"{RESPONSES}/{response_id}"
    for event in events[:-1]:
        by_query = await rest(other, response_id, event.number)
        by_header = await pod.http.get(f"{url}?stream=true", headers={"last-event-id": str(event.id)})
        assert events_in(by_query.text) == events_in(by_header.text) == events[event.number + 1 :]
    assert events_in((await rest(other, response_id)).text) == events
    nothing = await rest(other, response_id, events[-1].number)
    assert (nothing.status_code, nothing.content) == (204, b"")
    stream = await other.openai.responses.retrieve(response_id, stream=True, starting_after=events[-1].number)
    assert [event async for event in stream] == []


async def test_places_that_are_not_there(pod: RunningPod, worker: ScriptedWorker, paused: Paused) -> None:
    """Refused at once, while it still runs, too."""
    response = await pod.openai.responses.create(model=MODEL, input="Hello", background=True)
    url = f"{RESPONSES}/{response.id}"
    for after in ("99", "-2", "1.5", "x", "1-1", "9" * 400):
        given = await pod.http.get(url, params={"stream": "true", "starting_after": after})
        assert after[:40] in check_error(given, 400, "invalid_cursor", "starting_after")
    paused.go.set()
    for query, param in (
        ({"starting_after": "1"}, "starting_after"),
        ({"stream": "maybe"}, "stream"),
        ({"x": "1"}, "x"),
        ({"include": "nonsense"}, "include"),
        ({"include_obfuscation": "true"}, "include_obfuscation"),
    ):
        given = await pod.http.get(url, params=query)
        assert (given.status_code, given.json()["error"]["param"]) == (400, param)
    taken = await pod.openai.responses.retrieve(
        response.id, include=["message.output_text.logprobs"], include_obfuscation=False, stream=True
    )
    assert [event async for event in taken][-1].type == "response.completed"


async def test_nothing_that_is_asked_breaks_it(pod: RunningPod, worker: ScriptedWorker) -> None:
    events = events_in(await stream_of(pod))
    examples: list[tuple[str, dict[str, str]]] = []
    names = st.sampled_from(["stream", "starting_after", "include[]", "limit", "after", "order"])

    @settings(max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(["", "/input_items"]),
        st.dictionaries(names, st.text(max_size=9) | st.integers(-2, 15).map(str) | st.just("true")),
    )
    def collect(path: str, query: dict[str, str]) -> None:
        examples.append((path, query))

    collect()
    url = f"{RESPONSES}/{events[0].data['response']['id']}"
    for path, query in examples:
        response = await pod.http.get(f"{url}{path}", params=query)
        assert response.status_code in (200, 204, 400), (path, query, response.text)
        if response.headers["content-type" if response.status_code != 204 else "x-request-id"].startswith(
            "text"
        ):
            assert events_in(response.text) == events[-len(events_in(response.text)) :]


# Ending


@pytest.mark.parametrize("background", [True, False])
async def test_cancelling_ends_it_everywhere(
    pod: RunningPod, other: RunningPod, worker: ScriptedWorker, paused: Paused, background: bool
) -> None:
    """At its next token, from any pod; its readers' streams end, and cancelling again changes nothing."""
    body = ask(background=background, stream=True)
    async with pod.http.stream("POST", RESPONSES, json=body) as response:
        text = ""
        async for part in response.aiter_text():
            text += part
            if "output_text.delta" in text and '"cancelled"' not in text:
                cancelled = await other.openai.responses.cancel(response.headers["x-request-id"])
    events = events_in(text)
    assert kinds(events)[-1] == "cancelled"
    assert (cancelled.status, cancelled.error) == ("cancelled", None)
    assert check_response(events[-1].data["response"]) == await get(pod, cancelled.id)
    assert text_of(events) == cancelled.output_text
    assert cancelled.output[0].status == "incomplete"
    paused.go.set()
    await wait_until(lambda: worker.finished == 1)
    assert list(worker.stopped) == [cancelled.id]
    assert await pod.openai.responses.cancel(cancelled.id) == cancelled
    assert events_in((await rest(other, cancelled.id)).text) == events


async def test_both_of_the_clients_iterators_end_when_it_is_cancelled(
    pod: RunningPod, worker: ScriptedWorker, paused: Paused
) -> None:
    response = await pod.openai.responses.create(model=MODEL, input="Hello", background=True)
    plain = await pod.openai.responses.retrieve(response.id, stream=True)
    async with pod.openai.responses.stream(response_id=response.id) as helper:
        assert (await anext(helper)).type == "response.created"
        await pod.openai.responses.cancel(response.id)
        assert [event.type async for event in helper][-1] == "response.cancelled"
    assert [event.type async for event in plain][-1] == "response.cancelled"
    paused.go.set()


async def test_one_that_waits_is_taken_out_of_the_queue(pod: RunningPod, queue: JobQueue) -> None:
    """Its readers' streams end, too, in the background or not."""
    card = WorkerCard("worker-2", "idle", "scripted", "none", 8, 1, 2)
    await Registry(queue.redis).announce(card, [ModelCard("idle", "idle", 1000, 1_700_000_000)], ttl=60)
    for background in (True, False):
        body = ask(model="idle", background=background, stream=True)
        reading = asyncio.create_task(pod.http.post(RESPONSES, json=body))

        async def waiting() -> bool:
            return await queue.depth("idle", "interactive") == 1

        await wait_until(waiting)
        (response_id,) = await queue.redis.zrange(keys.queue("idle", "interactive"), 0, -1)
        cancelled = await pod.openai.responses.cancel(response_id.decode())
        assert (cancelled.status, cancelled.output) == ("cancelled", [])
        assert await queue.depth("idle", "interactive") == 0
        shown = ["created", "queued"] if background else ["created"]
        assert kinds(events_in((await reading).text)) == [*shown, "cancelled"]


async def test_one_that_has_ended_is_cancelled_in_vain(pod: RunningPod, worker: ScriptedWorker) -> None:
    response = await pod.openai.responses.create(model=MODEL, input="Hello")
    assert await pod.openai.responses.cancel(response.id) == response


async def test_deleted_is_gone_everywhere(
    pod: RunningPod, other: RunningPod, worker: ScriptedWorker, paused: Paused, redis: ArqRedis
) -> None:
    """One that runs is ended first."""
    response = await pod.openai.responses.create(model=MODEL, input="Hello", background=True)
    await wait_until(lambda: len(worker.jobs) == 1)
    deleted = await other.http.delete(f"{RESPONSES}/{response.id}")
    assert deleted.json() == {"id": response.id, "object": "response", "deleted": True}
    for method, path in (
        ("GET", ""),
        ("GET", "?stream=true"),
        ("GET", "/input_items"),
        ("POST", "/cancel"),
        ("DELETE", ""),
    ):
        answer = await pod.http.request(method, f"{RESPONSES}/{response.id}{path}")
        check_error(answer, 404, "response_not_found", "response_id")
    assert not await redis.exists(keys.stream(response.id))
    paused.go.set()
    await wait_until(lambda: worker.finished == 1)
    assert not await redis.exists(keys.stream(response.id))


async def test_one_that_has_lost_a_part_has_failed(
    pod: RunningPod, other: RunningPod, worker: ScriptedWorker
) -> None:
    """Its object and its events say nothing from behind the gap, and nothing can follow it."""
    worker.script = loses
    lost = await pod.openai.responses.create(model=MODEL, input="Hello", background=True)
    await wait_until(lambda: worker.finished == 1)
    failed = await get(other, lost.id)
    assert (failed.status, failed.output_text) == ("failed", WORDS[0])
    assert failed.error.message == GAP.message
    seen = await rest(pod, lost.id)
    assert WORDS[0] in seen.text
    assert WORDS[3] not in seen.text
    assert '"code":"stream_gap"' in seen.text
    behind = await rest(pod, lost.id, after=7)
    assert "events 0 to 6 so far" in check_error(behind, 400, "invalid_cursor", "starting_after")
    following = await pod.http.post(RESPONSES, json=ask(previous_response_id=lost.id))
    check_error(following, 400, "previous_response_failed", "previous_response_id")


# Keeping


async def test_what_is_stored_is_kept_for_its_time(
    redis_url: str, worker: ScriptedWorker, redis: ArqRedis
) -> None:
    async with serving(settings_for(redis_url, response_ttl=5000)) as pod:
        stored = await pod.openai.responses.create(model=MODEL, input="Hello")
        unstored = await pod.openai.responses.create(model=MODEL, input="Hello", store=False)
        assert 4990 < await redis.ttl(keys.stream(stored.id)) <= 5000
        assert await redis.ttl(keys.stream(unstored.id)) <= 600
        assert await redis.ttl(keys.stored(stored.id)) > 5000
        assert not await redis.exists(keys.stored(unstored.id))
        assert (await pod.openai.responses.retrieve(unstored.id)).output_text == STORY
        items = await pod.http.get(f"{RESPONSES}/{unstored.id}/input_items")
        check_error(items, 404, "response_not_stored", "response_id")
        await redis.delete(keys.stream(unstored.id))
        check_error(await pod.http.get(f"{RESPONSES}/{unstored.id}"), 410, "response_expired", "response_id")


async def test_another_keys_response_is_not_found(redis_url: str, worker: ScriptedWorker) -> None:
    async with serving(settings_for(redis_url, api_key=("mine", "theirs"))) as pod:
        mine, theirs = ({"authorization": f"Bearer {key}"} for key in ("mine", "theirs"))
        posted = await pod.http.post(RESPONSES, json=ask(), headers=mine)
        url = f"{RESPONSES}/{posted.json()['id']}"
        for method, path in (
            ("GET", ""),
            ("GET", "?stream=true&starting_after=1"),
            ("GET", "/input_items"),
            ("POST", "/cancel"),
            ("DELETE", ""),
        ):
            answer = await pod.http.request(method, url + path, headers=theirs)
            check_error(answer, 404, "response_not_found", "response_id")
        assert (await pod.http.get(url, headers=mine)).content == posted.content


async def test_ids_of_other_endpoints(pod: RunningPod, worker: ScriptedWorker) -> None:
    """The right place is named."""
    completion = (await pod.http.post(CHAT, json=chat())).json()["id"]
    message = check_error(
        await pod.http.get(f"{RESPONSES}/{completion}"), 404, "response_not_found", "response_id"
    )
    assert f"{CHAT}/" in message
    response = (await pod.http.post(RESPONSES, json=ask())).json()["id"]
    message = check_error(
        await pod.http.get(f"{CHAT}/{response}"), 404, "completion_not_found", "completion_id"
    )
    assert f"{RESPONSES}/" in message


async def test_input_items_come_page_by_page(pod: RunningPod, worker: ScriptedWorker) -> None:
    """The last comes first; all are of the official types, and the official client pages through them."""
    said = [{"role": "user" if n % 2 else "assistant", "content": f"{n}"} for n in range(45)]
    response = await pod.openai.responses.create(model=MODEL, input=said)
    url = f"{RESPONSES}/{response.id}/input_items"
    page = check_items((await pod.http.get(url)).json())
    assert [item.content[0].text for item in page.data] == [f"{n}" for n in range(44, 24, -1)]
    assert page.has_more
    assert (page.first_id, page.last_id) == (page.data[0].id, page.data[-1].id)
    every = [item async for item in pod.openai.responses.input_items.list(response.id, limit=7, order="asc")]
    assert [item.content[0].text for item in every] == [f"{n}" for n in range(45)]
    for query, param in (
        ({"limit": "0"}, "limit"),
        ({"limit": "101"}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "msg_1"}, "after"),
        ({"before": "msg_1"}, "before"),
    ):
        refused = await pod.http.get(url, params=query)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_the_whole_answer_can_be_gathered_from_its_stream(
    pod: RunningPod, worker: ScriptedWorker
) -> None:
    """As whoever runs batches does, without HTTP: the same bytes that a GET brings."""
    posted = await pod.http.post(RESPONSES, json=ask())
    streams = pod.server.config.app.state.pod.streams
    response_id = posted.json()["id"]
    entries = await streams.read(response_id)
    answer = Answer(decode_form(entries[0][1].form), response_id)
    answer.take(0, entries)
    assert answer.ended
    assert answer.encode() == posted.content == (await pod.http.get(f"{RESPONSES}/{response_id}")).content


async def test_events_without_ids(redis_url: str, worker: ScriptedWorker) -> None:
    """`--no-event-ids` leaves out the lines; the numbers are in the events all the same."""
    async with serving(settings_for(redis_url, event_ids=False)) as pod:
        events = events_in(await stream_of(pod), ids=False)
        assert kinds(events) == [*EVENTS, *["output_text.delta"] * len(WORDS), *DONE, "completed"]
        response_id = events[0].data["response"]["id"]
        assert events_in((await rest(pod, response_id, 5)).text, ids=False) == events[6:]
