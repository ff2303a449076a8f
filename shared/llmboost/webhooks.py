"""Settings of webhooks that are right each by itself, but not together."""

from urllib.parse import urlsplit

from llmboost.addresses import is_public, literal
from llmboost.settings import ApiSettings


def check(settings: ApiSettings) -> None:
    """Refuses what could never be delivered.

    Raises:
        ValueError: names the setting that is missing.
    """
    if not settings.webhook_url:
        return
    if not settings.webhook_secret:
        raise ValueError(
            "--webhook-secret (or LLMBOOST_WEBHOOK_SECRET) is needed with --webhook-url: by it receivers "
            "know that a webhook is yours. A new one: echo whsec_$(openssl rand -base64 32)"
        )
    if settings.webhook_allow_private:
        return
    for url in settings.webhook_url:
        host = urlsplit(url).hostname or ""
        address = literal(host)
        if address is not None and not is_public(address):
            raise ValueError(
                f"--webhook-url names {host}, a private address; "
                "if webhooks are to go there, give --webhook-allow-private"
            )
