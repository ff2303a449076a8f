"""A page of another origin uses the API by fetch, as OpenAI's JavaScript client does."""

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.browser.chromium import Page
from tests.e2e.asking import CHAT, chat, long_story, text_of
from tests.e2e.system import ONE_THREAD, System

KEY = "the-key-of-this-server"
HEADERS = {"Authorization": f"Bearer {KEY}", "X-Stainless-Lang": "js", "X-Stainless-Retry-Count": "0"}
ANY, ONE, ANOTHER = 0, 1, 2
"""Pods: for pages of any origin, for those of ours, and for those of another one."""


@pytest.fixture(scope="module")
def system(origin: str) -> Iterator[System]:
    with System() as running:
        running.start_worker(*ONE_THREAD)
        running.start_pod("--api-key", KEY)
        running.start_pod("--api-key", KEY, "--allowed-origins", f"https://chat.example.com,{origin}")
        running.start_pod("--api-key", KEY, "--allowed-origins", "https://chat.example.com")
        running.await_worker("worker")
        yield running


def ask(system: System, pod: int, *arguments: object) -> str:
    """The expression that asks in the page: body, headers, and how many frames to take."""
    return f"ask(...{json.dumps([system.urls[pod], *arguments])})"


@pytest.mark.parametrize("pod", [ANY, ONE], ids=["any", "one"])
async def test_an_answer_streams_into_the_page(system: System, page: Page, pod: int) -> None:
    """Token by token, with a key and headers of OpenAI's client, for which the browser asks leave first."""
    body = long_story(80, seed=3)
    async with httpx.AsyncClient(base_url=system.urls[pod], headers=HEADERS, timeout=60) as http:
        expected = text_of((await http.post(CHAT, json=body)).json())
    seen = await page.evaluate(ask(system, pod, {**body, "stream": True}, HEADERS))
    assert await page.evaluate("answer.textContent") == expected
    assert (seen["status"], seen["done"], seen["requestId"]) == (200, True, seen["id"])
    assert seen["reads"] > 20
    assert page.console == []


async def test_a_page_with_a_key_resumes(system: System, page: Page) -> None:
    """By fetch, for an EventSource can't send keys: another pod has what the first had not sent."""
    body = long_story(80, seed=4)
    async with httpx.AsyncClient(base_url=system.urls[ANY], headers=HEADERS, timeout=60) as http:
        expected = text_of((await http.post(CHAT, json=body)).json())
    seen = await page.evaluate(ask(system, ANY, {**body, "stream": True}, HEADERS, 20))
    assert not seen.get("done")
    rest = [system.urls[ONE], seen["id"], seen["lastEventId"], HEADERS]
    seen = await page.evaluate(f"resume(...{json.dumps(rest)})")
    assert seen["done"]
    assert await page.evaluate("answer.textContent") == expected


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (chat(), {}, 401, "missing_api_key"),
        (chat(), {"Authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        (chat(model="unknown"), HEADERS, 404, "model_not_found"),
        (chat(temperature=9), HEADERS, 400, "invalid_value"),
    ],
)
async def test_an_error_can_be_read(
    system: System, page: Page, body: object, headers: object, status: int, code: str
) -> None:
    """Its status, its words and the request's id, where a page would otherwise see a failed connection."""
    seen = await page.evaluate(ask(system, ANY, body, headers))
    assert (seen["status"], seen["error"]["code"]) == (status, code)
    assert seen["requestId"]


async def test_a_page_of_an_origin_that_is_not_allowed_gets_nothing(system: System, page: Page) -> None:
    """The browser doesn't even send the request."""
    with pytest.raises(AssertionError, match="Failed to fetch"):
        await page.evaluate(ask(system, ANOTHER, chat(), HEADERS))
    assert any("blocked by CORS policy" in line for line in page.console), page.console
