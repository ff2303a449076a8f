"""What tests of the SDK ask, hold up and read."""

import asyncio
import threading
from typing import Any

from llmboost import LLMBoost
from tests.integration.api_pod import WORDS, Step

STORY = "".join(WORDS)
CHAT = [{"role": "user", "content": "Tell me a story."}]


def held(event: threading.Event) -> Step:
    """A step of a script: waits for the test."""
    return asyncio.to_thread(event.wait, 20)


def read_all(llm: LLMBoost, count: int) -> dict[Any, str]:
    """What each of so many inputs was answered; refuses a second end of one, and text after it."""
    texts: dict[Any, str] = {}
    finished: set[Any] = set()
    while len(finished) < count:
        for output in llm.get_output(timeout=20):
            assert output["id"] not in finished
            assert output["error"] is None
            texts[output["id"]] = texts.get(output["id"], "") + output["val"]
            if output["finished"]:
                finished.add(output["id"])
    return texts
