"""One attempt to deliver a webhook: a signed POST to an address that was checked."""

import asyncio
import ssl
from collections.abc import Sequence
from types import TracebackType

import certifi
import httpx

from llmboost.jobs import now
from llmboost_api.webhooks import signature
from llmboost_api.webhooks.events import Event
from llmboost_api.webhooks.targets import Target

WITHIN_S = 15.0
"""From the question for the address to the answer's status."""
_CONNECT_WITHIN_S = 5.0
_ADDRESSES = 3
"""So many are tried, for a name may have some that can't be reached from here."""


class DeliveryFailed(Exception):
    """The target did not take it; `str()` says why. `final`: nor will it."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class Sender:
    """What connects to targets.

    - The name is resolved, the address checked, and then connected to itself. Its certificate is checked
      against the name.
    - Each delivery has a connection of its own: one that is kept belongs to an address, and a certificate
      that was good for one name says nothing of another at the same address.
    - Redirects and the environment's proxies are not followed: they would lead past the check.
    - The answer is its status; the rest of it is not read.
    """

    def __init__(
        self, secrets: Sequence[str], *, allow_private: bool, tls: ssl.SSLContext | None = None
    ) -> None:
        """`tls`: which certificates are trusted; default: those of browsers and of this host."""
        self._secrets = secrets
        self._allow_private = allow_private
        self._client = httpx.AsyncClient(
            verify=tls or _trust(),
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(WITHIN_S, connect=_CONNECT_WITHIN_S),
            limits=httpx.Limits(max_keepalive_connections=0),
            headers={"user-agent": "llmboost", "content-type": "application/json", "accept": "*/*"},
        )

    async def __aenter__(self) -> "Sender":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def send(self, event: Event, target: Target) -> int:
        """Delivers an event; returns the status with which it was taken.

        Raises:
            DeliveryFailed: it was not.
            TargetRefused: the target is a private address, and must not be sent to.
        """
        try:
            async with asyncio.timeout(WITHIN_S):
                status = await self._post(event, target)
        except TimeoutError:
            raise DeliveryFailed(f"no answer within {WITHIN_S:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise DeliveryFailed(str(error) or type(error).__name__) from error
        if 200 <= status < 300:
            return status
        if 300 <= status < 400:
            raise DeliveryFailed(
                f"status {status}: redirects are not followed, so name the place they lead to"
            )
        raise DeliveryFailed(f"status {status}", final=status == 410)

    async def _post(self, event: Event, target: Target) -> int:
        addresses = await target.addresses(allow_private=self._allow_private)
        body = event.body()
        for address in addresses[:_ADDRESSES]:
            signed = signature.headers(body, event.id, int(now()), self._secrets)
            try:
                async with self._client.stream(
                    "POST",
                    target.at(address),
                    content=body,
                    headers={"host": target.url.netloc.decode("ascii"), **signed},
                    extensions={"sni_hostname": target.host},
                ) as response:
                    return response.status_code
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure


def _trust() -> ssl.SSLContext:
    """Browsers' authorities, this host's own, and those of `SSL_CERT_FILE`."""
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
    return context
