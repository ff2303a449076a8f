"""`Idempotency-Key`: a request that is sent again joins the first one, so a retry never generates twice.

The key is taken in the script that enqueues the first job, and expires with the stream that it stands for:
as long as there is an answer to return, it is returned.
"""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from fastapi import Depends, Header

from llmboost import keys
from llmboost.entries import Once
from llmboost_api.errors import NO_RETRY, ApiError, quoted

HEADER = "Idempotency-Key"
LONGEST = 255


@dataclass(frozen=True, slots=True)
class RequestName:
    """The name that a client gave to its request, and what the request was."""

    key: str
    """Of Redis; an API key's names are its own."""
    digest: str
    """Of path and body."""
    given: str

    def once(self, completion_id: str) -> Once:
        """The name, for the completion that answers the request."""
        return Once(self.key, f"{self.digest} {completion_id}".encode())

    def completion_of(self, taken: bytes) -> str:
        """The completion that the name stands for.

        Raises:
            ApiError: it was given to another request (409).
        """
        digest, _, completion_id = taken.decode().partition(" ")
        if digest != self.digest:
            raise ApiError(
                409,
                f"The {HEADER} {quoted(self.given)} was used for another request. "
                "Give each request a key of its own; send the same body to get the same answer.",
                code="idempotency_key_reused",
                param=HEADER,
                headers=NO_RETRY,
            )
        return completion_id


def deleted() -> ApiError:
    """The answer that a name stands for was deleted."""
    return ApiError(
        410,
        f"The answer to the request with this {HEADER} was deleted. To ask anew, give another key.",
        code="answer_deleted",
        param=HEADER,
        headers=NO_RETRY,
    )


async def idempotency_key(
    key: Annotated[
        str | None,
        Header(
            alias=HEADER,
            description="A name for this request. Sent again with the same body, it joins the first one.",
        ),
    ] = None,
) -> str | None:
    """A dependency of routes that generate.

    Raises:
        ApiError: the key is too long, or is none (400).
    """
    if key is None:
        return None
    if not key.strip() or len(key) > LONGEST:
        raise ApiError(
            400,
            f"The {HEADER} has {len(key)} characters: it must have 1 to {LONGEST}, such as a UUID.",
            code="invalid_value",
            param=HEADER,
        )
    return key


IdempotencyKey = Annotated[str | None, Depends(idempotency_key)]
"""Of a route: the name that the request was given, if any."""


def name_of(key: str | None, path: str, data: dict[str, Any], owner: str) -> RequestName | None:
    """The name of a request, from its key and what it asks for; None if it has no key."""
    if key is None:
        return None
    body = msgspec.json.encode(data, order="sorted")
    return RequestName(
        key=keys.once(owner, hashlib.sha256(key.encode()).hexdigest()[:32]),
        digest=hashlib.sha256(path.encode() + b"\0" + body).hexdigest(),
        given=key,
    )
