"""Files and batches as a client sees them, without a model: a batch goes on each time it is looked at."""

import asyncio
import json
import secrets
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class FakeBatches:
    """Lines whose custom_id begins with `bad` fail, and a file with a line without one is refused."""

    step: int = 1000
    """Lines that are done between two looks."""
    key: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: dict[str, str] = field(default_factory=dict)
    """Ids of batches by Idempotency-Key."""
    fail: list[tuple[str, int]] = field(default_factory=list)
    """What goes wrong next: (method and path so far as they are given, status); 0 breaks in the middle."""
    requests: list[str] = field(default_factory=list)

    def routes(self) -> list[Route]:
        async def dispatch(request: Request) -> Response:
            asked = f"{request.method} {request.url.path}"
            self.requests.append(asked)
            if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
                return refusal(401, "The API key is wrong.")
            broken = False
            if self.fail and asked.startswith(self.fail[0][0]):
                _, status = self.fail.pop(0)
                if status:
                    return refusal(status, f"Planned: {status}.")
                broken = True
            response = await self.answer(request)
            return cut(response) if broken else response

        return [Route("/v1/{rest:path}", dispatch, methods=["GET", "POST"])]

    async def answer(self, request: Request) -> Response:
        match [request.method, *request.path_params["rest"].split("/")]:
            case ["GET", "models"]:
                return JSONResponse({"object": "list", "data": []})
            case ["POST", "files"]:
                async with request.form(max_part_size=1 << 30) as form:
                    assert form["purpose"] == "batch"
                    content = await form["file"].read()  # type: ignore[union-attr]
                return JSONResponse({"id": self.keep(content), "object": "file"})
            case ["GET", "files", file_id, "content"] if file_id in self.files:
                return Response(self.files[file_id])
            case ["POST", "batches"]:
                return self.create(await request.json(), request.headers["idempotency-key"])
            case ["GET", "batches", batch_id] if batch_id in self.batches:
                return self.show(batch_id)
            case ["POST", "batches", batch_id, "cancel"] if batch_id in self.batches:
                self.batches[batch_id]["status"] = "cancelling"
                return JSONResponse(self.public(batch_id))
        return refusal(404, f"There is no {request.path_params['rest']} here.")

    def keep(self, content: bytes) -> str:
        file_id = f"file-{secrets.token_hex(4)}"
        self.files[file_id] = content
        return file_id

    def create(self, body: dict[str, Any], key: str) -> Response:
        batch_id = self.created.setdefault(key, f"batch_{secrets.token_hex(4)}")
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines() if line.strip()]
        self.batches.setdefault(
            batch_id,
            {
                "id": batch_id,
                "object": "batch",
                "status": "validating",
                **body,
                "request_counts": {"total": 0, "completed": 0, "failed": 0},
                "lines": lines,
            },
        )
        return JSONResponse(self.public(batch_id))

    def public(self, batch_id: str) -> dict[str, Any]:
        return {name: value for name, value in self.batches[batch_id].items() if name != "lines"}

    def show(self, batch_id: str) -> Response:
        """As it was, and then a step further."""
        batch = self.batches[batch_id]
        shown = JSONResponse(self.public(batch_id))
        counts, lines = batch["request_counts"], batch["lines"]
        match batch["status"]:
            case "validating":
                nameless = [n for n, line in enumerate(lines, 1) if "custom_id" not in line]
                batch["status"] = "failed" if nameless else "in_progress"
                data = [{"code": "missing", "message": "custom_id is missing.", "line": n} for n in nameless]
                batch["errors"] = {"object": "list", "data": data} if nameless else None
                counts = batch["request_counts"] = {"total": len(lines), "completed": 0, "failed": 0}
            case "in_progress":
                done = counts["completed"] + counts["failed"] + self.step
                failed = sum(line["custom_id"].startswith("bad") for line in lines[:done])
                counts["failed"], counts["completed"] = failed, min(done, len(lines)) - failed
                if done >= len(lines):
                    batch["status"] = "completed"
                    self.write(batch, lines)
            case "cancelling":
                batch["status"] = "cancelled"
                self.write(batch, lines[: counts["completed"] + counts["failed"]])
        return shown

    def write(self, batch: dict[str, Any], done: list[dict[str, Any]]) -> None:
        for name, failed in (("output_file_id", False), ("error_file_id", True)):
            results = [line for line in done if line["custom_id"].startswith("bad") is failed]
            content = "".join(json.dumps({"custom_id": line["custom_id"]}) + "\n" for line in results)
            batch[name] = self.keep(content.encode()) if results else None


def refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status)


def cut(response: Response) -> Response:
    """It has done what it was asked for, but its answer breaks off in the middle."""

    async def half() -> AsyncIterator[bytes]:
        yield bytes(response.body[: len(response.body) // 2])
        raise ConnectionAbortedError

    headers = {"content-length": str(len(response.body))}
    return StreamingResponse(half(), response.status_code, headers)


class FakeServer:
    """`FakeBatches` on a port, which can go away and come back."""

    def __init__(self, batches: FakeBatches, port: int) -> None:
        self.batches = batches
        self.port = port
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        app = Starlette(routes=self.batches.routes())
        config = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), daemon=True)  # type: ignore[union-attr]
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = self._server.force_exit = True
            self._thread.join()
