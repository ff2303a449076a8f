"""Signatures of webhooks, as OpenAI's: https://www.standardwebhooks.com."""

import base64
import hashlib
import hmac
from collections.abc import Sequence

from llmboost.settings import WEBHOOK_SECRET


def headers(body: bytes, webhook_id: str, timestamp: int, secrets: Sequence[str]) -> dict[str, str]:
    """The headers by which a receiver knows who sent a body, and when (Unix time, s).

    One signature per secret: while one secret replaces another, receivers that know either accept it.
    """
    signed = b"%s.%d.%s" % (webhook_id.encode(), timestamp, body)
    signatures = [hmac.digest(_key(secret), signed, hashlib.sha256) for secret in secrets]
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(each).decode()}" for each in signatures),
    }


def _key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(WEBHOOK_SECRET))
