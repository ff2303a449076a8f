"""Where webhooks go, and where they must not: requests of this server reach what its clients can't."""

import asyncio
import hashlib
import socket

import httpx

from llmboost.addresses import is_public


class TargetRefused(Exception):
    """A webhook must not go there; `str()` says why, and what to do."""


class Target:
    """A URL that is told. Its path and query may be secrets: logs and jobs get its `name` and `fingerprint`.

    Raises:
        ValueError: it is no URL that can be sent to.
    """

    def __init__(self, url: str) -> None:
        try:
            self.url = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"--webhook-url: {error}") from None
        self.name = f"{self.url.scheme}://{self.url.netloc.decode('ascii')}"
        self.fingerprint = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()

    @property
    def host(self) -> str:
        """Its host as it is asked for: a name, or an address without brackets."""
        return self.url.raw_host.decode("ascii")

    @property
    def port(self) -> int:
        return self.url.port or (443 if self.url.scheme == "https" else 80)

    async def addresses(self, *, allow_private: bool) -> list[str]:
        """The addresses that it has now, best first. What connects uses these, and does not ask again: the
        next answer may be another.

        Raises:
            TargetRefused: one of them is private.
            OSError: the name can't be resolved.
        """
        addresses = await resolve(self.host, self.port)
        for address in addresses:
            if not allow_private and not is_public(address):
                raise TargetRefused(
                    f"{self.host} is {address}, a private address; "
                    "if webhooks are to go there, start the pods with --webhook-allow-private"
                )
        return addresses

    def at(self, address: str) -> httpx.URL:
        """The URL with an address in the place of its host."""
        return self.url.copy_with(host=address)


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host.

    Raises:
        OSError: it has none, or nobody can be asked.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(_address(each[4]) for each in found))


def _address(socket_address: "tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]") -> str:
    """With its scope, which makes an address private: `fe80::1%2`."""
    host = str(socket_address[0])
    scope = socket_address[3] if len(socket_address) == 4 else 0
    return f"{host}%{scope}" if scope and "%" not in host else host
