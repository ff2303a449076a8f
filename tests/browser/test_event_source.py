"""A page follows a stream with the browser's own EventSource, which connects again by itself."""

import json
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from llmboost.connection import connect
from llmboost.streams import TokenStreams
from tests.browser.chromium import Page
from tests.commands import ROOT
from tests.e2e.asking import CHAT, attempts, long_story, text_of
from tests.e2e.system import System, scaled
from tests.integration.test_proxy import proxy, pytestmark  # noqa: F401 (skipped where there is no nginx)
from tests.waiting import wait_until

STORY = long_story(900, seed=11)
SHOWN = 40
"""Frames that a page has had before something dies."""
ENDED_S = 180.0
CLOSED = 2
"""An EventSource's `readyState` when it tries no more."""
DOCUMENTED = "http://localhost:8011"
"""Where the documentation's examples find the API."""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """Two pods and two workers; no test kills more than one of either."""
    with scaled(2, 2, pod_flags=("--ping-interval", "0.2")) as running:
        yield running


@pytest.fixture(scope="module")
def story(system: System) -> str:
    """The text of the story when nothing dies."""
    with system.http() as http:
        return text_of(http.post(CHAT, json=STORY, timeout=ENDED_S).json())


@pytest.fixture
async def api(system: System, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of the proxy before the pods."""
    ports = [int(url.rpartition(":")[2]) for url in system.urls]
    async with proxy(tmp_path, (ports[0], ports[1])) as client:
        yield str(client.base_url).rstrip("/")


@pytest.fixture
async def streams(system: System) -> AsyncIterator[TokenStreams]:
    redis = connect(system.redis_url)
    yield TokenStreams(redis, retention=600)
    await redis.aclose()


async def begin(page: Page, api: str) -> str:
    """Has the page ask for the story, and follow it as soon as it has begun; returns the completion's id."""
    arguments = json.dumps([api, {**STORY, "stream": True}, {}, 1])
    asked = await page.evaluate(f"ask(...{arguments})")
    assert asked["status"] == 200
    await page.evaluate("answer.replaceChildren()")
    await page.evaluate(f"follow({json.dumps(api)}, {json.dumps(asked['id'])})")
    await page.wait_for(f"followed.ids.length >= {SHOWN}")
    completion_id: str = asked["id"]
    return completion_id


async def ended(page: Page) -> dict[str, Any]:
    """Waits until the page has had all, and the browser has been told that there is no more."""
    await page.wait_for("followed.done", within=ENDED_S)
    await page.wait_for(f"followed.state == {CLOSED}")
    followed: dict[str, Any] = await page.evaluate("followed")
    assert len({*followed["ids"]}) == len(followed["ids"]), "a frame came twice"
    return followed


def serving(system: System) -> str:
    """Name of the pod that has a client."""

    def clients(name: str) -> int:
        connections = system.parts[name].member("api").net_connections("tcp")
        port = int(system.urls[int(name.rpartition("-")[2])].rpartition(":")[2])
        return sum(each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED for each in connections)

    pods = [name for name in system.parts if name.startswith("pod-") and clients(name)]
    return pods[0] if len(pods) == 1 else ""


async def test_the_pod_is_killed(system: System, story: str, page: Page, api: str) -> None:
    """The browser goes on at the other pod, and the page shows the text of an unbroken run: nothing is lost
    or repeated. At the end the browser asks once more, is told so, and stops."""
    await begin(page, api)
    pod = await wait_until(lambda: serving(system))
    killed = system.parts.pop(pod)
    killed.signal(signal.SIGKILL)
    killed.wait()
    assert not await page.evaluate("followed.done"), "the stream had ended before the pod was killed"
    followed = await ended(page)
    assert await page.evaluate("answer.textContent") == story
    assert followed["opened"] == 2


async def test_a_worker_is_killed(
    system: System, story: str, page: Page, api: str, streams: TokenStreams
) -> None:
    """The page sees a pause and the same text; its connection stays."""
    completion_id = await begin(page, api)
    (first,) = await attempts(streams, completion_id)
    pid = int(first.rsplit("-", 2)[1])
    name = next(name for name, part in system.parts.items() if part.process.pid == pid)
    killed = system.parts.pop(name)
    killed.signal(signal.SIGKILL)
    killed.wait()
    assert not await page.evaluate("followed.done"), "the stream had ended before its worker was killed"
    followed = await ended(page)
    assert await page.evaluate("answer.textContent") == story
    assert followed["opened"] == 1
    assert len(await attempts(streams, completion_id)) == 2


async def test_the_documented_page(page: Page, api: str) -> None:
    """The example of docs/api.md, word for word, shows the answer and stops."""
    (example,) = re.findall(r"```js\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    assert DOCUMENTED in example
    await page.evaluate("document.body.replaceChildren()")
    await page.evaluate(f"(async () => {{{example.replace(DOCUMENTED, api)} window.source = source }})()")
    await page.wait_for(f"source.readyState == {CLOSED}")
    async with httpx.AsyncClient(timeout=60) as http:
        answer = await http.get((await page.evaluate("source.url")).partition("?")[0])
    assert await page.evaluate("document.body.textContent") == text_of(answer.json())
