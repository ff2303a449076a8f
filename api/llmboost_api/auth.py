"""Who asks: API keys, compared in constant time."""

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from llmboost_api.errors import ApiError
from llmboost_api.pod import pod_of

_bearer = HTTPBearer(auto_error=False, description="One of the server's API keys, if it has any.")
_CHALLENGE = {"www-authenticate": "Bearer"}


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def fingerprint(key: str) -> str:
    """What a job and its stream know of the key that made them."""
    return _digest(key.encode())[:16]


async def owner(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> str:
    """Fingerprint of the request's key; empty if the server asks for none.

    Raises:
        ApiError: 401, the key is missing or not one of the server's.
    """
    accepted = pod_of(request).settings.api_key
    if not accepted:
        return ""
    if credentials is None:
        raise ApiError(
            401,
            "This server asks for an API key: send one as `Authorization: Bearer KEY`.",
            code="missing_api_key",
            headers=_CHALLENGE,
        )
    # Header values are decoded as latin-1; these are the bytes that were sent.
    given = _digest(credentials.credentials.encode("latin-1", "replace"))
    matches = [hmac.compare_digest(given, _digest(key.encode())) for key in accepted]
    if not any(matches):
        raise ApiError(
            401,
            "The API key is not one of this server's. Check `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers=_CHALLENGE,
        )
    return given[:16]


Asker = Annotated[str, Depends(owner)]
"""Of a route: whose request it is."""
