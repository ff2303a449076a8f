"""Forms as they go over the wire, right and wrong."""

from collections.abc import Sequence
from itertools import pairwise

BOUNDARY = "boundary-of-the-form"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"

Part = tuple[str, bytes]
"""What stands behind `form-data`, and the data."""

FILE: Part = ('; name="file"; filename="input.jsonl"', b'{"custom_id": "1"}\r\n{"custom_id": "2"}\n')
PURPOSE: Part = ('; name="purpose"', b"batch")


def value(name: str, data: str) -> Part:
    """A field that is no file."""
    return f'; name="{name}"', data.encode()


def form(*parts: Part) -> bytes:
    """The body of a form with these parts, in this order."""
    begin = f"--{BOUNDARY}\r\nContent-Disposition: form-data"
    body = b"".join(f"{begin}{head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts)
    return body + f"--{BOUNDARY}--\r\n".encode()


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """The data in pieces, cut there."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]
