"""Places where files are kept: the local disk, and an S3 server that keeps everything in memory."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from llmboost.embedded import free_port

BUCKET = "files-bucket"
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of one that runs."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client() as client:
            while True:
                assert server.poll() is None, "the S3 server ended"
                try:
                    client.get(f"{url}/moto-api/")
                    break
                except httpx.TransportError:
                    pass
        yield url
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(params=["local", "s3"])
def files_url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place of either kind."""
    if request.param == "local":
        return str(tmp_path / "files")
    endpoint = request.getfixturevalue("s3_endpoint")
    for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    httpx.post(f"{endpoint}/moto-api/reset")
    _client(endpoint).create_bucket(Bucket=BUCKET)
    return f"s3://{BUCKET}/some/prefix"


@cache
def _client(endpoint: str) -> Any:
    """Takes a while to be made."""
    keys = {name.lower(): value for name, value in S3_ENVIRONMENT.items() if name != "AWS_DEFAULT_REGION"}
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)


def left_in(url: str) -> list[str]:
    """All that a storage holds, and the uploads that it has not heard the end of."""
    if not url.startswith("s3://"):
        return [path.name for path in Path(url).rglob("*")]
    client = _client(os.environ["AWS_ENDPOINT_URL"])
    objects = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    uploads = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    return [each["Key"] for each in (*objects, *uploads)]
