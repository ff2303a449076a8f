"""Webhooks without a network: what they say, how they are signed, and where they must not go."""

import openai
import pytest

from llmboost.addresses import is_public, literal
from llmboost.jobs import new_id, now
from llmboost.settings import ApiSettings
from llmboost.webhooks import check
from llmboost_api.webhooks import delivery, signature, targets
from llmboost_api.webhooks.events import Event
from llmboost_api.webhooks.targets import Target, TargetRefused

OLD, NEW, OTHER = (
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "whsec_RdvaYFYUXuIFuEbvZHwMfYFhUf7aMYjYcmM24+Aj40c=",
    "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
)
CLIENT = openai.OpenAI(api_key="-", base_url="http://localhost")


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        *(("response", status) for status in ("completed", "failed", "cancelled", "incomplete")),
        *(("batch", status) for status in ("completed", "failed", "expired", "cancelled")),
    ],
)
def test_the_official_client_unwraps_every_event(kind: str, status: str) -> None:
    subject = new_id("resp_" if kind == "response" else "batch_")
    event = Event.of(kind, status, subject, 1_700_000_000)  # type: ignore[arg-type]
    headers = signature.headers(event.body(), event.id, int(now()), [OLD])
    unwrapped = CLIENT.webhooks.unwrap(event.body(), headers, secret=OLD)
    assert type(unwrapped).__name__ == f"{kind.title()}{status.title()}WebhookEvent"
    assert unwrapped.to_dict() == {
        "id": event.id,
        "object": "event",
        "created_at": 1_700_000_000,
        "type": f"{kind}.{status}",
        "data": {"id": subject},
    }
    assert headers["webhook-id"] == event.id
    assert event.id.startswith("evt_")


def test_an_end_makes_the_same_event_each_time_and_another_end_another() -> None:
    subject = new_id("resp_")
    event = Event.of("response", "completed", subject, 1)
    assert Event.of("response", "completed", subject, 1) == event
    assert Event.of("response", "failed", subject, 1).id != event.id
    assert Event.of("response", "completed", new_id("resp_"), 1).id != event.id


def test_each_of_several_secrets_signs_and_no_other_secret_fits() -> None:
    """So that a secret can be replaced while receivers know either."""
    body = b'{"type":"batch.failed"}'
    headers = signature.headers(body, "evt_1", int(now()), [OLD, NEW])
    for secret in (OLD, NEW):
        CLIENT.webhooks.verify_signature(body, headers, secret=secret)
    for altered, secret in ((body, OTHER), (body + b" ", OLD)):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            CLIENT.webhooks.verify_signature(altered, headers, secret=secret)
    with pytest.raises(openai.InvalidWebhookSignatureError, match="too old"):
        CLIENT.webhooks.verify_signature(body, signature.headers(body, "evt_1", 1, [OLD]), secret=OLD)


# Where they must not go

PRIVATE = """
    0.0.0.0 127.0.0.1 127.255.0.1 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 100.64.0.1 169.254.169.254
    192.0.0.1 192.0.2.1 192.88.99.1 198.18.0.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255
    :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:a9fe:a9fe fe80::1 fe80::1%2 fc00::1 fd12::1
    fec0::1 ff02::1 ff0e::1 64:ff9b::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b:1::1 100::1 2001::1 2001:db8::1
    2002:7f00:1:: 2002:a00:1:: 2002:c0a8:101::1 3fff::1 5f00::1 2606:4700::1111%2
""".split()
PUBLIC = """
    1.1.1.1 8.8.8.8 172.32.0.1 100.128.0.1 192.0.1.1 223.255.255.1 ::ffff:8.8.8.8 64:ff9b::8.8.8.8
    2002:808:808::1 2606:4700:4700::1111 2a00:1450::1
""".split()


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "0x7f000001", "0x7f.0.0.1", "2130706433", "017700000001", "127.1", "0"),
        *(
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[fe80::1]",
            "localhost",
            "a.localhost",
            "LOCALHOST",
        ),
        *("169.254.169.254", "0xa9fea9fe", "10.1"),
    ],
)
def test_a_private_address_in_whatever_form_is_refused_at_start(host: str) -> None:
    url = f"http://{host}:8000/hook"
    with pytest.raises(ValueError, match=r"--webhook-url names .*--webhook-allow-private"):
        check(ApiSettings(webhook_url=(url,), webhook_secret=(OLD,)))
    check(ApiSettings(webhook_url=(url,), webhook_secret=(OLD,), webhook_allow_private=True))


def test_names_and_public_addresses_are_taken() -> None:
    """What a name stands for is found out at each delivery."""
    assert literal("hooks.example.com") is None
    urls = ("https://hooks.example.com/a?b=c", "http://8.8.8.8:81", "https://[2606:4700:4700::1111]/x")
    check(ApiSettings(webhook_url=urls, webhook_secret=(OLD,)))


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1", "http://0x7f000001/", "http://2130706433", "http://127.1:8080"),
        *("http://[::ffff:127.0.0.1]/", "https://[::1]", "http://localhost", "http://0"),
    ],
)
async def test_a_private_target_is_refused_at_delivery(url: str) -> None:
    """By the address that would be connected to, however it is written."""
    with pytest.raises(TargetRefused, match=r"a private address; .*--webhook-allow-private"):
        await Target(url).addresses(allow_private=False)
    assert await Target(url).addresses(allow_private=True)


async def test_one_private_address_among_others_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        assert (host, port) == ("hooks.example.com", 443)
        return ["8.8.8.8", "10.0.0.1"]

    monkeypatch.setattr(targets, "resolve", resolve)
    with pytest.raises(TargetRefused, match=r"hooks\.example\.com is 10\.0\.0\.1"):
        await Target("https://hooks.example.com/").addresses(allow_private=False)


def test_a_target_is_named_without_its_secrets() -> None:
    target = Target("https://hooks.example.com:444/services/token?key=secret")
    assert target.name == "https://hooks.example.com:444"
    assert str(target.at("2606:4700::1")) == "https://[2606:4700::1]:444/services/token?key=secret"
    assert target.fingerprint != Target("https://hooks.example.com:444/other").fingerprint


def test_the_pauses_add_up_to_three_days() -> None:
    pauses = [delivery.pause(tries) for tries in range(1, delivery.MAX_TRIES)]
    assert 4 <= pauses[0] <= 6
    assert 2.4 * 86400 < sum(pauses) < 4 * 86400 < delivery._EXPIRES.total_seconds()
