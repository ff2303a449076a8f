"""The container files, as far as a look at them goes; tests/e2e/test_compose.py runs their commands."""

import re
from typing import Any

import pytest
import yaml

from llmboost.settings import ApiSettings, ServeSettings, variable
from tests.commands import ROOT

COMPOSE = ROOT / "compose"
FILES = ("compose.yaml", "compose.gpu.yaml")
COPY = re.compile(r"^COPY ((?:[^-\s]\S* +)+)\S+$", re.MULTILINE)
"""What a Dockerfile takes from the repository."""


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((COMPOSE / name).read_text())
    return loaded


def seconds(duration: str) -> float:
    number, unit = duration[:-1], duration[-1]
    return float(number) * {"s": 1, "m": 60}[unit]


@pytest.mark.parametrize("name", ["redis", "api-1", "api-2", "worker-1", "worker-2", "proxy"])
def test_every_service_is_safe_to_run(name: str) -> None:
    service = load("compose.yaml")["services"][name]
    assert service["init"] is True
    assert service["restart"] == "unless-stopped"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert seconds(service["stop_grace_period"]) >= 20
    assert ("user" in service) != ("build" in service)  # an image of ours names its user itself


def test_grace_periods_outlast_the_drain() -> None:
    services = load("compose.yaml")["services"]
    drain = ApiSettings.model_fields["drain_timeout"].default
    assert seconds(services["api-1"]["stop_grace_period"]) > drain
    assert seconds(services["proxy"]["stop_grace_period"]) > drain


def test_redis_is_reached_by_pods_and_workers_alone() -> None:
    """It has no password: nothing else shares its network, and its port is not published."""
    file = load("compose.yaml")
    assert file["networks"]["queue"]["internal"] is True
    assert file["services"]["redis"]["networks"] == ["queue"]
    assert "ports" not in file["services"]["redis"]
    assert "queue" not in file["services"]["proxy"]["networks"]


@pytest.mark.parametrize("name", FILES)
def test_every_variable_is_a_setting(name: str) -> None:
    known = {variable(field) for field in ServeSettings.model_fields}
    used = set(re.findall(r"LLMBOOST_[A-Z_]+", (COMPOSE / name).read_text()))
    used |= set(re.findall(r"LLMBOOST_[A-Z_]+", (COMPOSE / ".env.example").read_text()))
    assert used - {"LLMBOOST_NAME"} <= known


def test_the_override_only_changes_what_is_there() -> None:
    base, override = load("compose.yaml"), load("compose.gpu.yaml")
    assert set(override["services"]) <= set(base["services"])


def test_the_proxy_never_sends_a_request_again() -> None:
    config = (COMPOSE / "nginx.conf").read_text()
    directives = [line.strip() for line in config.splitlines() if not line.strip().startswith("#")]
    assert [line for line in directives if line.startswith("proxy_next_upstream ")] == [
        "proxy_next_upstream error timeout;"
    ]


@pytest.mark.parametrize("name", ["Dockerfile.api", "Dockerfile.worker"])
def test_images_are_pinned_and_not_root(name: str) -> None:
    text = (COMPOSE / name).read_text()
    users = re.findall(r"^USER (.+)$", text, re.MULTILINE)
    assert users
    assert users[-1] not in ("0", "root")
    installs = re.findall(r"pip install .*", text)
    assert installs
    assert all("-c constraints.txt" in line for line in installs)
    for sources in COPY.findall(text):
        for source in sources.split():
            assert (ROOT / source).exists(), source


def test_the_image_of_a_pod_has_no_torch() -> None:
    text = (COMPOSE / "Dockerfile.api").read_text()
    assert "[worker]" not in text
    assert not re.search(r"install.*\btorch\b", text)


def test_images_get_all_they_copy() -> None:
    """.dockerignore lets through what the Dockerfiles take."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    texts = [(COMPOSE / name).read_text() for name in ("Dockerfile.api", "Dockerfile.worker")]
    assert {source for text in texts for sources in COPY.findall(text) for source in sources.split()} == kept
