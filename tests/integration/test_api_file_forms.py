"""The form that a file comes in: any right one is taken, and of any other nothing is left."""

import itertools
from collections.abc import AsyncIterator, Sequence

import httpx
import pytest
from arq.connections import ArqRedis

from llmboost import keys
from tests.waiting import wait_until

from .api_pod import RunningPod
from .file_pods import LONG, MAX_FILE_BYTES, MIB, local_pod, nothing_left, pod
from .forms import BOUNDARY, CONTENT_TYPE, FILE, PURPOSE, Part, form, value
from .storages import files_url, s3_endpoint

__all__ = ["files_url", "local_pod", "pod", "s3_endpoint"]


async def post(pod: RunningPod, body: bytes | AsyncIterator[bytes], **headers: str) -> httpx.Response:
    headers = {"content-type": CONTENT_TYPE, **headers}
    return await pod.http.post("/v1/files", content=body, headers=headers)


EXPIRES = (value("expires_after[anchor]", "created_at"), value("expires_after[seconds]", "3600"))


@pytest.mark.parametrize("parts", [*itertools.permutations([FILE, PURPOSE, *EXPIRES])])
async def test_fields_come_in_any_order(local_pod: RunningPod, parts: Sequence[Part]) -> None:
    response = await post(local_pod, form(*parts))
    assert response.status_code == 200, response.text
    made = response.json()
    assert made["expires_at"] == made["created_at"] + 3600
    assert (await local_pod.http.get(f"/v1/files/{made['id']}/content")).content == FILE[1]


async def test_a_form_comes_in_any_pieces(pod: RunningPod) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in form(PURPOSE, FILE):
            yield bytes([byte])

    made = (await post(pod, pieces())).json()
    assert (await pod.openai.files.content(made["id"])).content == FILE[1]


WRONG: dict[str, tuple[bytes, str | None, str]] = {
    "nothing": (b"", None, "breaks off"),
    "no form": (b'{"purpose": "batch"}', None, "oundary"),
    "no parts": (f"--{BOUNDARY}--\r\n".encode(), "purpose", "missing"),
    "no file": (form(PURPOSE), "file", "missing"),
    "no purpose": (form((FILE[0], LONG)), "purpose", "missing"),
    "unknown purpose": (form((FILE[0], LONG), value("purpose", "fun")), "purpose", "fun"),
    "the batch runner's purpose": (form(value("purpose", "batch_output"), FILE), "purpose", "batch_output"),
    "two purposes": (form(PURPOSE, PURPOSE, FILE), "purpose", "twice"),
    "two files": (form(PURPOSE, (FILE[0], LONG), FILE), "file", "twice"),
    "a file that is none": (form(PURPOSE, value("file", "x")), "file", "filename"),
    "a long name": (form(PURPOSE, (f'; name="file"; filename="{"x" * 256}"', b"")), "file", "255"),
    "unknown field": (form(PURPOSE, FILE, value("purposes", "x")), "purposes", "Did you mean 'purpose'?"),
    "long field": (form(value("purpose", "x" * 2000), FILE), "purpose", "longer than"),
    "no anchor": (form(PURPOSE, FILE, EXPIRES[1]), "expires_after.anchor", "missing"),
    "no seconds": (form(PURPOSE, FILE, EXPIRES[0]), "expires_after.seconds", "missing"),
    "another anchor": (
        form(PURPOSE, FILE, value("expires_after[anchor]", "last_active_at"), EXPIRES[1]),
        "expires_after.anchor",
        "created_at",
    ),
    "few seconds": (
        form(PURPOSE, FILE, EXPIRES[0], value("expires_after[seconds]", "3599")),
        "expires_after.seconds",
        "at least 3600",
    ),
    "many seconds": (
        form(PURPOSE, FILE, EXPIRES[0], value("expires_after[seconds]", "2592001")),
        "expires_after.seconds",
        "at most 2592000",
    ),
    "no number": (
        form(PURPOSE, FILE, EXPIRES[0], value("expires_after[seconds]", "1h")),
        "expires_after.seconds",
        "an integer",
    ),
    "broken off": (form(PURPOSE, (FILE[0], LONG))[:-10], None, "breaks off"),
    "another boundary": (form(PURPOSE, FILE).replace(BOUNDARY.encode(), b"other"), None, "oundary"),
}


@pytest.mark.parametrize(
    ("files_url", "name"),
    [*(("local", name) for name in WRONG), ("s3", "two files"), ("s3", "no purpose"), ("s3", "broken off")],
    indirect=["files_url"],
)
async def test_a_wrong_form_is_refused_and_leaves_nothing(
    pod: RunningPod, redis: ArqRedis, files_url: str, name: str
) -> None:
    body, param, words = WRONG[name]
    response = await post(pod, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    await nothing_left(redis, files_url)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", ""])
async def test_a_wrong_content_type_is_refused(local_pod: RunningPod, kind: str) -> None:
    response = await post(local_pod, form(PURPOSE, FILE), **{"content-type": kind})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_form"


async def test_an_encoded_form_is_refused(local_pod: RunningPod) -> None:
    response = await post(local_pod, form(PURPOSE, FILE), **{"content-encoding": "gzip"})
    assert response.status_code == 415


@pytest.mark.parametrize("declared", [True, False])
async def test_a_file_that_is_too_large_leaves_nothing(
    pod: RunningPod, redis: ArqRedis, files_url: str, declared: bool
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        head, tail = form(PURPOSE, (FILE[0], b"|")).split(b"|")
        yield head
        for _ in range(MAX_FILE_BYTES // MIB + 1):
            yield bytes(MIB)
        yield tail

    body = pieces() if not declared else b"".join([piece async for piece in pieces()])
    response = await post(pod, body)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "file_too_large"
    assert str(MAX_FILE_BYTES) in response.json()["error"]["message"]
    await nothing_left(redis, files_url)


async def test_a_client_that_leaves_leaves_nothing(pod: RunningPod, redis: ArqRedis, files_url: str) -> None:
    """In the middle of its file, whose beginning was stored already."""

    async def pieces() -> AsyncIterator[bytes]:
        yield form(PURPOSE, (FILE[0], LONG))[: 2 * MIB]
        await wait_until(lambda: redis.zcard(keys.FILES_DUE))
        raise EOFError

    with pytest.raises(EOFError):
        await post(pod, pieces())
    await wait_until(lambda: not pod.server.server_state.tasks)
    await nothing_left(redis, files_url)
