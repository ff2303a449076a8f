"""Whatever comes as an upload, in whatever pieces: it is a file, or an error of the client's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis import Redis

from llmboost_api.app import create_app

from .api_pod import settings_for
from .forms import CONTENT_TYPE, FILE, PURPOSE, Part, cut, form
from .storages import left_in

FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]", "other")
VALUES = (b"batch", b"user_data", b"created_at", b"3600", b"-1", b"", b"\xff", b"x" * 1025)

heads = st.builds(
    lambda name, filename: f'; name="{name}"' + filename,
    st.sampled_from(FIELDS),
    st.sampled_from(("", '; filename="a"', '; filename=""', '; filename="' + "x" * 256 + '"')),
)
parts: st.SearchStrategy[list[Part]] = st.lists(
    st.sampled_from((FILE, PURPOSE)) | st.tuples(heads, st.sampled_from(VALUES) | st.binary(max_size=50)),
    max_size=5,
)
damage = st.tuples(st.integers(0, 300), st.integers(0, 5), st.binary(max_size=5))
places = st.lists(st.integers(0, 1000), max_size=10)


@pytest.fixture
def client(redis_url: str, tmp_path: Path) -> Iterator[TestClient]:
    with Redis.from_url(redis_url) as redis:
        redis.flushall()
        with TestClient(create_app(settings_for(redis_url, files_url=str(tmp_path)))) as client:
            yield client
        redis.flushall()


# The pod's thread draws its jitter while a strategy draws its values.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
def test_any_upload_is_answered(client: TestClient, tmp_path: Path) -> None:
    seen: set[int] = set()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @example([FILE, PURPOSE], [], [], CONTENT_TYPE)
    @given(parts, st.lists(damage, max_size=2), places, st.sampled_from((CONTENT_TYPE, CONTENT_TYPE + "x")))
    def fuzz(wanted: list[Part], damages: Any, where: list[int], content_type: str) -> None:
        body = bytearray(form(*wanted))
        for start, length, instead in damages:
            body[start : start + length] = instead
        headers = {"content-type": content_type}
        response = client.post("/v1/files", content=iter(cut(bytes(body), where)), headers=headers)
        seen.add(response.status_code)
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            error = response.json()["error"]
            assert error["message"]
            assert len(error["message"]) < 1000
        else:
            made = response.json()
            assert client.get(f"/v1/files/{made['id']}").json() == made
            assert len(client.get(f"/v1/files/{made['id']}/content").content) == made["bytes"]
            assert client.delete(f"/v1/files/{made['id']}").json()["deleted"] is True
        assert left_in(str(tmp_path)) == []

    fuzz()
    assert seen == {200, 400}
