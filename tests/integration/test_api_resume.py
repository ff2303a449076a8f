"""GET on a completion's id: exactly the rest of the stream, from any pod, wherever the connection broke."""

import asyncio
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from openai import AsyncStream
from openai.types.chat import ChatCompletionChunk

from llmboost.entries import ChoiceDelta, Delta, TokenLogprob
from llmboost.jobs import GenerationJob
from llmboost.streams import SEAL_ID, TokenStreams, Writer
from llmboost_api import sse

from ..commands import ROOT
from ..waiting import wait_until
from .answers import events, id_in, last_id
from .api_pod import (
    CHAT,
    COMPLETIONS,
    MODEL,
    RETRY,
    WORDS,
    RunningPod,
    ScriptedWorker,
    Step,
    ends,
    fails,
    says,
    serving,
    settings_for,
    streamed,
)

USAGE = {"stream_options": {"include_usage": True}}


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
        unbroken = (await one.http.post(path, json=streamed(path, **fields))).text
        completion_id = id_in(unbroken)
        resumed: dict[str | None, set[str]] = {}
        for cut in range(len(unbroken.encode())):
            received = events(unbroken.encode()[:cut].decode(errors="ignore"))
            after = last_id(received)
            if after not in resumed:
                brought = [await other.rest(path, completion_id, after, how) for how in ("header", "query")]
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
        unbroken = (await one.http.post(CHAT, json=streamed(CHAT))).text
        assert ('"usage"' in unbroken) == always
        assert await other.rest(CHAT, id_in(unbroken)) == unbroken


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
    unbroken = (await pod.http.post(CHAT, json=streamed(CHAT))).text
    received = events(unbroken)
    assert [last_id([event]) for event in received] == ["1-1", "1-2", "2-1.1", "2-1", SEAL_ID]
    for had in range(len(received)):
        resumed = await pod.rest(CHAT, id_in(unbroken), last_id(received[:had]))
        assert "".join(received[:had]) + resumed == unbroken


# While it runs


async def test_a_running_stream_goes_on_at_another_pod(
    redis_url: str, pod: RunningPod, worker: ScriptedWorker
) -> None:
    """A reader that comes back gets what it missed and then what comes."""
    missed, going = asyncio.Event(), asyncio.Event()
    texts = says(WORDS)
    worker.script = lambda job: [texts[0], missed.wait(), *texts[1:3], going.wait(), *texts[3:], ends()]
    async with pod.begun(CHAT, streamed(CHAT)) as broken:
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
        whole = await other.rest(CHAT, broken.id)
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
            received = await part(pod, "POST", CHAT, json=streamed(CHAT, n=2, **USAGE))
        completion_id = id_in(received[0])
        while last_id(received) != SEAL_ID:
            headers = {"last-event-id": last_id(received) or ""}
            url = f"{CHAT}/{completion_id}?stream=true"
            received += await part(random.choice([pod, other]), "GET", url, headers=headers)
        assert connections > 25
        assert "".join(received) == await other.rest(CHAT, completion_id)


async def test_a_stream_is_joined_before_its_first_token(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Several readers of one stream, before it has begun and in its middle, all get all of it."""
    begin, go_on = asyncio.Event(), asyncio.Event()
    texts = says(WORDS)
    worker.script = lambda job: [begin.wait(), *texts[:2], go_on.wait(), *texts[2:], ends()]
    first = asyncio.create_task(pod.http.post(CHAT, json=streamed(CHAT)))
    await wait_until(lambda: worker.jobs)
    completion_id = worker.jobs[0].id
    readers = [asyncio.create_task(pod.rest(CHAT, completion_id)) for _ in range(3)]
    whole = asyncio.create_task(pod.http.get(f"{CHAT}/{completion_id}"))
    await wait_until(lambda: len(pod.generations) == 5)
    begin.set()
    await wait_until(lambda: worker.jobs)
    late = asyncio.create_task(pod.rest(CHAT, completion_id))
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
        async with pod.begun(CHAT, streamed(CHAT)) as broken:
            pass
        await wait_until(lapsed)
        reader = asyncio.create_task(pod.rest(CHAT, broken.id))
        await wait_until(promised)
        never.set()
        await reader


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
    assert "".join(events(received)) + resumed == await pod.rest(CHAT, worker.jobs[0].id)


async def test_an_official_client_reads_a_resumed_stream(pod: RunningPod, worker: ScriptedWorker) -> None:
    """`retry:` and ids with every frame are no hindrance to it."""
    unbroken = (await pod.http.post(CHAT, json=streamed(CHAT))).text
    stream = await pod.openai.get(
        f"/chat/completions/{id_in(unbroken)}",
        cast_to=ChatCompletionChunk,
        options={"params": {"stream": True, "starting_after": "1-2"}},
        stream=True,
        stream_cls=AsyncStream[ChatCompletionChunk],
    )
    assert [chunk.choices[0].delta.content async for chunk in stream] == [*WORDS[2:], ""]
