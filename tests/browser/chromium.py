"""A headless Chromium, driven over its own protocol (https://chromedevtools.github.io/devtools-protocol/)."""

import asyncio
import json
import os
import re
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from tests.commands import Command

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STARTED_S = 60.0

_FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    *(["--no-sandbox"] if os.geteuid() == 0 else []),  # which root can't have
    "--window-size=900,600",
)


class Chromium:
    """A running browser; `with Chromium(folder) as browser:` leaves nothing of it behind."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM, "there is no Chromium"
        self._command = Command([CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"])

    def __enter__(self) -> "Chromium":
        line = self._command.wait_for_line("DevTools listening on ", among="err", within=STARTED_S)
        found = re.search(r"ws://([^/]+)/", line)
        assert found, line
        self._url = f"http://{found[1]}"
        return self

    def __exit__(self, *error: object) -> None:
        self._command.__exit__(None, None, None)

    async def open(self, url: str) -> "Page":
        """A new tab, to be entered."""
        async with httpx.AsyncClient(timeout=STARTED_S) as http:
            tab = (await http.put(f"{self._url}/json/new?about:blank")).json()
        return Page(tab["webSocketDebuggerUrl"], url)


class Page:
    """A tab with a page in it: an async context manager, which closes the tab."""

    def __init__(self, devtools: str, url: str) -> None:
        self.console: list[str] = []
        """What it has written there, uncaught errors and the browser's own complaints included."""
        self._devtools = devtools
        self._url = url
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def __aenter__(self) -> "Page":
        self._socket: ClientConnection = await connect(self._devtools, max_size=None)
        self._reader = asyncio.create_task(self._read())
        for domain in ("Runtime", "Log"):
            await self._call(f"{domain}.enable")
        await self._call("Page.navigate", url=self._url)
        await self.wait_for("document.readyState == 'complete' && location.protocol != 'about:'")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._call("Page.close")
        self._reader.cancel()
        await self._socket.close()

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise; it must be JSON.

        Raises:
            AssertionError: it threw.
        """
        reply = await self._call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if thrown := reply.get("exceptionDetails"):
            raise AssertionError(f"{expression}: {_words(thrown)}\n{self._log}")
        return reply["result"].get("value")

    async def wait_for(self, expression: str, within: float = 60.0) -> Any:
        """Polls until the expression is true; returns its value."""
        deadline = time.monotonic() + within
        while not (value := await self.evaluate(expression)):
            if time.monotonic() > deadline:
                raise AssertionError(f"not true within {within} s: {expression}\n{self._log}")
            await asyncio.sleep(0.02)
        return value

    @property
    def _log(self) -> str:
        return "\n".join(["--- console", *self.console])

    async def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = len(self._calls)
        self._calls[number] = asyncio.get_running_loop().create_future()
        await self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        reply = await asyncio.wait_for(self._calls[number], STARTED_S)
        assert "error" not in reply, f"{method}: {reply}"
        result: dict[str, Any] = reply["result"]
        return result

    async def _read(self) -> None:
        async for message in self._socket:
            event = json.loads(message)
            if "id" in event:
                self._calls[event["id"]].set_result(event)
                continue
            params = event["params"]
            match event["method"]:
                case "Runtime.consoleAPICalled":
                    words = (str(each.get("value", each.get("description"))) for each in params["args"])
                    self.console.append(" ".join(words))
                case "Runtime.exceptionThrown":
                    self.console.append(_words(params["exceptionDetails"]))
                case "Log.entryAdded":
                    self.console.append(params["entry"]["text"] + " " + params["entry"].get("url", ""))


def _words(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description", details["text"]))
