"""GET on a completion's id: exactly the rest of the stream, from any pod, wherever the connection broke."""

import asyncio
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import pytest
from arq.connections import ArqRedis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncStream
from openai.types.chat import ChatCompletionChunk

from llmboost import keys
from llmboost.entries import ChoiceDelta, Delta, TokenLogprob
from llmboost.jobs import GenerationJob, new_id
from llmboost.streams import SEAL_ID, TokenStreams, Writer
from llmboost_api import directory, generation, sse

from ..commands import ROOT
from ..waiting import wait_until
from .answers import check_error, events, frames_of, id_in, last_id
from .api_pod import (
    MODEL,
    WORDS,
    RunningPod,
    ScriptedWorker,
    Step,
    chat,
    ends,
    fails,
    says,
    serving,
    settings_for,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USAGE = {"stream_options": {"include_usage": True}}
RETRY = sse.RETRY.decode()


def asks(path: str, **fields: Any) -> dict[str, Any]:
    """A streamed request."""
    fields = {"stream": True, **fields}
    return chat(**fields) if path == CHAT else {"model": MODEL, "prompt": "Say", **fields}


async def rest(
    pod: RunningPod, path: str, completion_id: str, after: str | None = None, how: str = "header"
) -> str:
    """What a resumed stream brings."""
    headers = {"last-event-id": after} if after and how == "header" else {}
    query = {"starting_after": after} if after and how == "query" else {}
    response = await pod.http.get(
        f"{path}/{completion_id}", params={"stream": "true", **query}, headers=headers
    )
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"] == completion_id
    assert response.text.startswith((RETRY + "id: ", RETRY + "data: "))
    assert response.text.count(RETRY) == 1
    return response.text.removeprefix(RETRY)


# Every place at which a connection can break


def logprobs(texts: Iterable[str]) -> list[TokenLogprob]:
    return [TokenLogprob(text, -0.5, list(text.encode())) for text in texts]


def one_choice(job: GenerationJob) -> Iterable[Step]:
    return [*says(WORDS), ends()]


def one_choice_with_logprobs(job: GenerationJob) -> Iterable[Step]:
    """Some tokens show nothing by themselves: their logprobs are held for a later frame."""
    texts = ["Once", "", "", "😀", " upon", ""]
    return [*says(texts, logprobs=logprobs(texts)), ends(6)]


def three_choices_in_turns(job: GenerationJob) -> Iterable[Step]:
    """Entries that make several frames, one, or none; two of them in one write."""
    first = [ChoiceDelta(index, 0, [1], text) for index, text in enumerate(["a", "", "c"])]
    second = [ChoiceDelta(index, 1, [2], text) for index, text in enumerate(["d", "e", "f"])]
    last = [ChoiceDelta(index, 2, [3], text, "stop") for index, text in enumerate(["", "h", "i"])]
    return [[Delta(first, prompt_tokens=5), Delta(second)], Delta([]), Delta(last), ends(9)]


def an_error_at_the_end(job: GenerationJob) -> Iterable[Step]:
    return [*says(["Once", " upon"], reason=None), fails("It broke.", code="engine")]


def no_text_at_all(job: GenerationJob) -> Iterable[Step]:
    return [*says([""]), ends(1)]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("script", "fields"),
    [
        (one_choice, {}),
        (one_choice, USAGE),
        (one_choice_with_logprobs, {"logprobs": 1}),
        (three_choices_in_turns, {"n": 3, **USAGE}),
        (an_error_at_the_end, {}),
        (no_text_at_all, USAGE),
    ],
)
async def test_wherever_it_breaks_the_rest_is_exact(
    redis_url: str, worker: ScriptedWorker, path: str, script: Any, fields: dict[str, Any]
) -> None:
    """Cut after any byte, a stream that is resumed at another pod is, byte for byte, the unbroken one."""
    worker.script = script
    if "logprobs" in fields and path == CHAT:
        fields = {"logprobs": True, "top_logprobs": 1}
    async with serving(settings_for(redis_url)) as one, serving(settings_for(redis_url)) as other:
        unbroken = (await one.http.post(path, json=asks(path, **fields))).text
        completion_id = id_in(unbroken)
        resumed: dict[str | None, set[str]] = {}
        for cut in range(len(unbroken.encode())):
            received = events(unbroken.encode()[:cut].decode(errors="ignore"))
            after = last_id(received)
            if after not in resumed:
                brought = [await rest(other, path, completion_id, after, how) for how in ("header", "query")]
                resumed[after] = set(brought)
            assert {"".join(received) + text for text in resumed[after]} == {unbroken}
        # Once for each frame but the last, and once for none: every frame has an id of its own.
        assert len(resumed) == len(events(unbroken))


@pytest.mark.parametrize("always", [True, False])
async def test_another_pods_settings_change_nothing(
    redis_url: str, worker: ScriptedWorker, always: bool
) -> None:
    """Whether a stream ends with usage was settled when it was asked for."""
    async with (
        serving(settings_for(redis_url, always_include_usage=always)) as one,
        serving(settings_for(redis_url, always_include_usage=not always)) as other,
    ):
        unbroken = (await one.http.post(CHAT, json=asks(CHAT))).text
        assert ('"usage"' in unbroken) == always
        assert await rest(other, CHAT, id_in(unbroken)) == unbroken


async def test_a_takeover_in_between_is_invisible(
    pod: RunningPod, worker: ScriptedWorker, streams: TokenStreams
) -> None:
    """An id from before another worker took over still names its place."""

    async def take_over(job_id: str) -> None:
        second = Writer(job_id, 2)
        await streams.begin(second, "worker-2")
        await worker.append(second, [Delta([ChoiceDelta(0, 2, [3], " a", "stop")])])
        await streams.seal(job_id, ends(3), second)

    worker.script = lambda job: [*says(["Once", " upon"], reason=None), take_over(job.id)]
    unbroken = (await pod.http.post(CHAT, json=asks(CHAT))).text
    received = events(unbroken)
    assert [last_id([event]) for event in received] == ["1-1", "1-2", "2-1.1", "2-1", SEAL_ID]
    for had in range(len(received)):
        resumed = await rest(pod, CHAT, id_in(unbroken), last_id(received[:had]))
        assert "".join(received[:had]) + resumed == unbroken


# While it runs


async def test_a_running_stream_goes_on_at_another_pod(
    redis_url: str, pod: RunningPod, worker: ScriptedWorker
) -> None:
    """A reader that comes back gets what it missed and then what comes."""
    missed, going = asyncio.Event(), asyncio.Event()
    texts = says(WORDS)
    worker.script = lambda job: [texts[0], missed.wait(), *texts[1:3], going.wait(), *texts[3:], ends()]
    async with pod.begun(CHAT, asks(CHAT)) as broken:
        pass
    missed.set()
    async with (
        serving(settings_for(redis_url)) as other,
        other.http.stream(
            "GET",
            f"{CHAT}/{broken.id}",
            params={"stream": "true"},
            headers={"last-event-id": last_id(broken.events) or ""},
        ) as response,
    ):
        chunks = response.aiter_text()
        text = await anext(chunks)
        while len(events(text)) < 2:
            text += await anext(chunks)
        going.set()
        text += "".join([chunk async for chunk in chunks])
        whole = await rest(other, CHAT, broken.id)
    assert "".join(broken.events) + text.removeprefix(RETRY) == whole
    assert whole.endswith("data: [DONE]\n\n")


async def test_a_stream_that_breaks_again_and_again(
    redis_url: str, pod: RunningPod, worker: ScriptedWorker
) -> None:
    """However often its connections break while it runs, wherever, and whoever continues it: it is whole."""
    random = Random(1)
    connections = 0

    def script(job: GenerationJob) -> Iterable[Step]:
        """Some tokens come only when the client has come back once more."""
        for number in range(100):
            yield wait_until(lambda seen=number // 4: connections > seen)
            deltas = [ChoiceDelta(index, number, [number], f" {number}") for index in range(2)]
            yield Delta(deltas, prompt_tokens=5 if number == 0 else None)
        yield Delta([ChoiceDelta(index, 100, [0], "", "stop") for index in range(2)])
        yield ends(202)

    async def part(pod: RunningPod, method: str, url: str, **fields: Any) -> list[str]:
        """The events that came whole before the connection broke."""
        nonlocal connections
        connections += 1
        received = b""
        async with pod.http.stream(method, url, **fields) as response:
            assert response.status_code == 200, await response.aread()
            until = random.randrange(4000)
            async for chunk in response.aiter_bytes(100):
                received += chunk
                if len(received) >= until:
                    break
        return events(received.removeprefix(sse.RETRY).decode(errors="ignore"))

    worker.script = script
    async with serving(settings_for(redis_url)) as other:
        received: list[str] = []
        while not received:
            received = await part(pod, "POST", CHAT, json=asks(CHAT, n=2, **USAGE))
        completion_id = id_in(received[0])
        while last_id(received) != SEAL_ID:
            headers = {"last-event-id": last_id(received) or ""}
            url = f"{CHAT}/{completion_id}?stream=true"
            received += await part(random.choice([pod, other]), "GET", url, headers=headers)
        assert connections > 25
        assert "".join(received) == await rest(other, CHAT, completion_id)


async def test_a_stream_is_joined_before_its_first_token(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Several readers of one stream, before it has begun and in its middle, all get all of it."""
    begin, go_on = asyncio.Event(), asyncio.Event()
    texts = says(WORDS)
    worker.script = lambda job: [begin.wait(), *texts[:2], go_on.wait(), *texts[2:], ends()]
    first = asyncio.create_task(pod.http.post(CHAT, json=asks(CHAT)))
    await wait_until(lambda: worker.jobs)
    completion_id = worker.jobs[0].id
    readers = [asyncio.create_task(rest(pod, CHAT, completion_id)) for _ in range(3)]
    whole = asyncio.create_task(pod.http.get(f"{CHAT}/{completion_id}"))
    await wait_until(lambda: len(pod.generations) == 5)
    begin.set()
    await wait_until(lambda: worker.jobs)
    late = asyncio.create_task(rest(pod, CHAT, completion_id))
    await wait_until(lambda: len(pod.generations) == 6)
    go_on.set()
    unbroken = (await first).text
    assert [await reader for reader in (*readers, late)] == [unbroken] * 4
    assert (await whole).json()["choices"][0]["message"]["content"] == "".join(WORDS)


async def test_whoever_joins_is_its_audience(
    redis_url: str, worker: ScriptedWorker, streams: TokenStreams
) -> None:
    """A resumed stream is promised a reader, as its first connection promised one."""
    never = asyncio.Event()
    worker.script = lambda job: [*says(["Once"], reason=None), never.wait(), ends(1)]

    async def lapsed() -> bool:
        return (await streams.audience([broken.id]))[0] < 0

    async def promised() -> bool:
        return (await streams.audience([broken.id]))[0] > 0

    async with serving(settings_for(redis_url, grace=0.3)) as pod:
        async with pod.begun(CHAT, asks(CHAT)) as broken:
            pass
        await wait_until(lapsed)
        reader = asyncio.create_task(rest(pod, CHAT, broken.id))
        await wait_until(promised)
        never.set()
        await reader


# Whole


async def test_the_whole_answer_can_be_fetched(
    redis_url: str, pod: RunningPod, worker: ScriptedWorker
) -> None:
    """Without `stream` a GET is answered as the POST was, streamed or not; official clients can ask."""
    for path, shown in ((CHAT, "chat.completion"), (COMPLETIONS, "text_completion")):
        posted = await pod.http.post(path, json=asks(path, stream=False))
        async with serving(settings_for(redis_url)) as other:
            fetched = await other.http.get(f"{path}/{posted.json()['id']}")
        assert fetched.content == posted.content
        assert fetched.headers["x-request-id"] == posted.json()["id"]
        streamed = (await pod.http.post(path, json=asks(path))).text
        fetched = await pod.http.get(f"{path}/{id_in(streamed)}", params={"stream": "false"})
        assert (fetched.json()["object"], fetched.json()["id"]) == (shown, id_in(streamed))
    completion = await pod.openai.chat.completions.retrieve(worker.jobs[0].id)
    assert completion.choices[0].message.content == "".join(WORDS)


async def test_an_answer_that_failed_fails_again(pod: RunningPod, worker: ScriptedWorker) -> None:
    """With the status that it had; nothing is to be gained by asking once more."""
    worker.script = lambda job: [fails("Too long.", status=400, code="c")]
    posted = await pod.http.post(CHAT, json=asks(CHAT, stream=False))
    for query in ({}, {"stream": "true"}):
        fetched = await pod.http.get(f"{CHAT}/{posted.headers['x-request-id']}", params=query)
        assert (fetched.status_code, fetched.content) == (400, posted.content)
        assert fetched.headers["x-should-retry"] == "false"


async def test_several_prompts_are_read_from_the_beginning(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Their frames carry no ids, so a GET brings all of them, and refuses to go on in the middle."""
    body = asks(COMPLETIONS, prompt=["a", "b"], n=2, **USAGE)
    unbroken = (await pod.http.post(COMPLETIONS, json=body)).text
    assert last_id(events(unbroken)) is None
    again = await rest(pod, COMPLETIONS, id_in(unbroken))
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


# As users do it


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_the_readmes_lines_work(pod: RunningPod, worker: ScriptedWorker, tmp_path: Path) -> None:
    """What they print follows what they cut off."""
    texts = [f" {number}" for number in range(50)]
    worker.script = lambda job: [*says(texts), ends(50)]
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (lines,) = [block for block in blocks if "Last-Event-ID" in block]
    lines = lines.replace("http://localhost:8011", pod.url).replace("llmboost-demo", MODEL)
    process = await asyncio.create_subprocess_exec(
        "bash", "-euc", lines, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, env={"PATH": os.environ["PATH"]}
    )
    printed, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    received = (tmp_path / "part.txt").read_text()
    assert len(events(received)) == 10
    resumed = printed.decode().removeprefix(RETRY)
    assert "".join(events(received)) + resumed == await rest(pod, CHAT, worker.jobs[0].id)


async def test_an_official_client_reads_a_resumed_stream(pod: RunningPod, worker: ScriptedWorker) -> None:
    """`retry:` and ids with every frame are no hindrance to it."""
    unbroken = (await pod.http.post(CHAT, json=asks(CHAT))).text
    stream = await pod.openai.get(
        f"/chat/completions/{id_in(unbroken)}",
        cast_to=ChatCompletionChunk,
        options={"params": {"stream": True, "starting_after": "1-2"}},
        stream=True,
        stream_cls=AsyncStream[ChatCompletionChunk],
    )
    assert [chunk.choices[0].delta.content async for chunk in stream] == [*WORDS[2:], ""]


async def test_what_has_ended_is_read_after_its_deadline_too(
    pod: RunningPod, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline is that of the generation; its answer stays for the retention."""
    unbroken = (await pod.http.post(CHAT, json=asks(CHAT))).text
    monkeypatch.setattr(generation, "_loop_time", lambda unix_time: -1e9)
    assert await rest(pod, CHAT, id_in(unbroken)) == unbroken


# What can't be had


async def test_another_keys_completion_is_not_found(redis_url: str, worker: ScriptedWorker) -> None:
    """An id is no credential; and what is another's looks like what never was."""
    async with serving(settings_for(redis_url, api_key=("mine", "theirs"))) as pod:
        mine, theirs = ({"authorization": f"Bearer {key}"} for key in ("mine", "theirs"))
        posted = await pod.http.post(CHAT, json=asks(CHAT, stream=False), headers=mine)
        url = f"{CHAT}/{posted.json()['id']}"
        assert (await pod.http.get(url, headers=mine)).content == posted.content
        for query in ({}, {"stream": "true"}, {"stream": "true", "starting_after": SEAL_ID}):
            response = await pod.http.get(url, params=query, headers=theirs)
            message = check_error(response, 404, "completion_not_found", "completion_id")
            assert "API key" in message
        check_error(await pod.http.get(url), 401, "missing_api_key")


async def test_ids_that_never_were(pod: RunningPod, worker: ScriptedWorker) -> None:
    """404, and at the wrong endpoint the right one is named."""
    posted = await pod.http.post(COMPLETIONS, json=asks(COMPLETIONS, stream=False))
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
    streamed = (await pod.http.post(CHAT, json=asks(CHAT))).text
    await redis.delete(keys.stream(id_in(streamed)))
    for query in ({}, {"stream": "true"}, {"stream": "true", "starting_after": SEAL_ID}):
        response = await pod.http.get(f"{CHAT}/{id_in(streamed)}", params=query)
        assert "not kept any more" in check_error(response, 410, "completion_expired", "completion_id")


async def test_after_the_last_frame_there_is_no_content(pod: RunningPod, worker: ScriptedWorker) -> None:
    """204 ends a browser's EventSource, which otherwise connects again for ever; after an error too."""
    for script in (one_choice, an_error_at_the_end):
        worker.script = script
        streamed = (await pod.http.post(CHAT, json=asks(CHAT))).text
        assert last_id(events(streamed)) == SEAL_ID
        response = await pod.http.get(
            f"{CHAT}/{id_in(streamed)}", params={"stream": "true"}, headers={"last-event-id": SEAL_ID}
        )
        assert (response.status_code, response.content) == (204, b"")


async def test_the_header_wins_over_the_query(pod: RunningPod, worker: ScriptedWorker) -> None:
    """An EventSource connects again to the URL that it was made with, which may name an earlier place."""
    streamed = (await pod.http.post(CHAT, json=asks(CHAT))).text
    url = f"{CHAT}/{id_in(streamed)}?stream=true&starting_after=1-1"
    resumed = await pod.http.get(url, headers={"last-event-id": "1-3"})
    assert resumed.text.removeprefix(RETRY) == "".join(events(streamed)[3:])
    resumed = await pod.http.get(url, headers={"last-event-id": ""})
    assert resumed.text.removeprefix(RETRY) == "".join(events(streamed)[1:])


async def test_places_that_are_not_in_the_stream(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Each is refused with the name of what was wrong, before anything is sent."""
    streamed = (await pod.http.post(CHAT, json=asks(CHAT))).text
    url = f"{CHAT}/{id_in(streamed)}"
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
        response = await pod.http.post(path, json=asks(path), headers={"last-event-id": "1-3"})
        message = check_error(response, 400, "invalid_cursor", "Last-Event-ID")
        assert f"GET {path}/" in message
    assert not worker.jobs


async def test_without_redis_it_is_503(
    pod: RunningPod, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a 404 that a client would believe."""

    async def refuses(job_id: str, entry_id: str) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(directory, "PATIENCE_S", 0.2)
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
    streamed = (await pod.http.post(CHAT, json=asks(CHAT))).text
    ours = id_in(streamed)
    number = st.integers(0, 3) | st.integers(0, 2**70)
    places = (
        st.text(max_size=20)
        | st.builds("{}-{}".format, number, number)
        | st.builds("{}-{}.{}".format, number, number, number)
        | st.sampled_from([SEAL_ID, f"{SEAL_ID}.1", "1-5.1", "1-1"])
    )
    latin = st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=20)
    examples: list[tuple[str, dict[str, str], bytes | None]] = []

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
            assert streamed.endswith(response.text.removeprefix(RETRY))
    assert {200, 204, 400, 404} <= statuses
