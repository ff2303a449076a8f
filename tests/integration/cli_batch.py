"""`llmboost batch` as tests run it: its inputs and what it leaves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmboost.cli.batch import run, server

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "POLL_S", 0.01)
    monkeypatch.setattr(server, "_LONGEST_PAUSE_S", 0.05)
    monkeypatch.delenv("LLMBOOST_URL", raising=False)
    monkeypatch.delenv("LLMBOOST_API_KEY", raising=False)


def write(*custom_ids: str, url: str = "/v1/chat/completions") -> None:
    """An input of these lines."""
    lines = [
        {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "tiny", "messages": []}}
        for custom_id in custom_ids
    ]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def ids_in(path: str) -> list[str]:
    return [json.loads(line)["custom_id"] for line in Path(path).read_text().splitlines()]


def files() -> set[str]:
    return {path.name for path in Path().iterdir()}
