"""Where a webhook goes, and where it must not."""

import logging
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from llmboost.jobs import new_id, now
from llmboost_api.webhooks import sender, targets
from llmboost_api.webhooks.events import Event
from llmboost_api.webhooks.sender import DeliveryFailed, Sender
from llmboost_api.webhooks.targets import Target

from .receiver import SECRET, Receiver, receiving
from .webhook_ends import Ends, ends, quick, receiver

__all__ = ["ends", "quick", "receiver"]


async def test_a_redirect_is_not_followed(ends: Ends, receiver: Receiver) -> None:
    """It would lead past the check of the address."""
    async with receiving() as elsewhere:
        receiver.statuses = [302, 307]
        receiver.location = elsewhere.url()
        webhooks = ends.webhooks(receiver.url())
        async with webhooks:
            await ends.response(webhooks)
            await ends.settled()
    assert len(receiver.calls) == 3
    assert not elsewhere.calls


async def test_nothing_is_sent_to_a_private_address_without_permission(
    ends: Ends, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the name stood for when the pod started, or a moment ago."""
    answers = [["8.8.8.8", "127.0.0.1"], ["127.0.0.1"]]

    async def resolve(host: str, port: int) -> list[str]:
        return answers[0]

    monkeypatch.setattr(targets, "resolve", resolve)
    webhooks = ends.webhooks(receiver.url(host="hooks.example.com"), allow_private=False)
    async with webhooks:
        for _ in range(2):
            await ends.response(webhooks)
            await ends.settled()
            assert caplog.records[-1].levelno == logging.ERROR
            assert "hooks.example.com is 127.0.0.1, a private address" in caplog.text
            assert "--webhook-allow-private" in caplog.text
            answers.pop(0)
            answers.append(["127.0.0.1"])
    assert not receiver.calls


async def test_the_address_that_was_checked_is_connected_to(
    ends: Ends, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is asked about once; a first address that can't be reached costs nothing."""
    asked = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.2", "127.0.0.1"]

    monkeypatch.setattr(targets, "resolve", resolve)
    webhooks = ends.webhooks(receiver.url(host="hooks.invalid"))
    async with webhooks:
        await ends.response(webhooks)
        await ends.settled()
    assert asked == ["hooks.invalid"]
    assert [call.headers["host"] for call in receiver.calls] == [f"hooks.invalid:{receiver.port}"]


async def test_proxies_of_the_environment_are_not_used(
    ends: Ends, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with receiving() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url(""))
        webhooks = ends.webhooks(receiver.url())
        async with webhooks:
            await ends.response(webhooks)
            await ends.settled()
    assert len(receiver.taken) == 1
    assert not proxy.calls


async def test_a_target_that_says_nothing_has_failed(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "WITHIN_S", 0.1)
    receiver.statuses = [None]
    async with Sender([SECRET], allow_private=True) as sending:
        with pytest.raises(DeliveryFailed, match=r"no answer within 0\.1 s"):
            await sending.send(event(), Target(receiver.url()))


async def test_a_certificate_is_checked_against_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is an address that is connected to, and another name was good there a moment ago."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    monkeypatch.setattr(targets, "resolve", resolve)
    certificate = certify("hooks.example.com", tmp_path)

    def server_side() -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        return context

    trusting = ssl.create_default_context(cafile=str(certificate))
    async with (
        receiving(server_side) as receiver,
        Sender([SECRET], allow_private=True, tls=trusting) as sending,
        Sender([SECRET], allow_private=True) as strict,
    ):
        good = Target(receiver.url(host="hooks.example.com", scheme="https"))
        other = Target(receiver.url(host="other.example.com", scheme="https"))
        assert await sending.send(event(), good) == 200
        with pytest.raises(DeliveryFailed, match="not valid for 'other"):
            await sending.send(event(), other)
        with pytest.raises(DeliveryFailed, match="self-signed"):
            await strict.send(event(), good)
    assert len(receiver.calls) == 1


def event() -> Event:
    return Event.of("batch", "completed", new_id("batch_"), int(now()))


def certify(name: str, folder: Path) -> Path:
    """A certificate that signs itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path
