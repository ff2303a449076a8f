"""Workers die, freeze and are replaced, and nobody who reads sees more than a pause."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from random import Random

import jsonschema
import pytest

from tests.faults.fleet import Fleet, exit_of
from tests.faults.load import STREAMS, Load
from tests.faults.oracle import Oracle
from tests.faults.requests import REPORT, report, request
from tests.faults.ties import judge

LEASE_S = 2.0
REPORTS = 24


@pytest.fixture(scope="module")
def file_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """There is no limit to the workers that a request may lose."""
    flags = ("--lease", str(LEASE_S), "--max-tries", "100")
    with Fleet(tmp_path_factory.mktemp("fleet"), worker_flags=flags) as fleet:
        yield fleet


async def test_the_oracle(fleet: Fleet, oracle: Oracle) -> None:
    """Without faults every token is what a plain forward draws, up to a tie in thousands of them; and an
    answer with one token that it would not draw is found out, though nothing is missing from it."""
    await oracle.learn(fleet, [request(number) for number in range(STREAMS)])
    plain = oracle.answers()[:24]
    await oracle.learn(fleet, [report(number) for number in range(REPORTS)])
    answers = oracle.answers()[-4:] + plain
    wrong = [replace(answer, token_ids=list(answer.token_ids)) for answer in answers[:14]]
    for number, answer in enumerate(wrong):
        answer.token_ids[number] += 1
    verdicts = await judge(answers + wrong)
    assert [verdict.wrong for verdict in verdicts[: len(answers)]] == [""] * len(answers)
    assert sum(len(verdict.ties) for verdict in verdicts[: len(answers)]) <= 3
    assert all(verdict.wrong for verdict in verdicts[len(answers) :])


async def test_a_killed_worker(fleet: Fleet, oracle: Oracle) -> None:
    """A worker is killed in mid-stream, and its heir in turn: every stream goes on over the same connection,
    under one id, token for token. The next token comes within twice the lease, if the machine is free."""
    for _ in range(2):
        await fleet.ready()
        async with Load(fleet, oracle, official=True) as load:
            await load.begun()
            name, orphans = await load.busiest()
            fleet.kill(name)
            killed_at, crowding = time.monotonic(), fleet.crowding()
            await load.moved_on(orphans)
            pause = max(reader.worst_gap(killed_at) for reader in orphans)
            assert pause < 2 * LEASE_S + crowding.look()
            fleet.mend()
        assert all(reader.posts == 1 and reader.resumed == 0 for reader in load.readers)


async def test_a_worker_killed_in_json(fleet: Fleet, oracle: Oracle) -> None:
    """A worker is killed while it writes JSON by a schema: its heir stands where it stood in the grammar, so
    that each answer is what it is when nobody dies, and fits the schema."""
    async with Load(fleet, oracle, ask=report, streams=REPORTS, official=True) as load:
        await load.begun(streams=REPORTS // 2)
        for each in fleet.worker_names:  # or all might have ended when it is known who has most of them
            fleet.freeze(each)
        name, orphans = await load.busiest()
        fleet.kill(name)
        for each in fleet.worker_names:
            fleet.thaw(each)
        await load.moved_on(orphans)
        assert [reader for reader in orphans if len(await load.workers(reader)) > 1]
    for reader in load.readers:
        jsonschema.validate(json.loads(reader.choices[0].text), REPORT)
        assert reader.posts == 1
        assert reader.resumed == 0


async def test_a_frozen_worker(fleet: Fleet, oracle: Oracle) -> None:
    """A worker is stopped for longer than its lease and then goes on: by then its streams are another's. It
    writes nothing more, drops their sequences, and takes new work."""
    async with Load(fleet, oracle) as load:
        await load.begun()
        zombie, taken = await load.busiest()
        fleet.freeze(zombie)
        await load.moved_on(taken)
        newest = {reader.id: await load.workers(reader) for reader in taken}
        fleet.thaw(zombie)
        await fleet.idle(zombie)
        for reader in taken:
            assert await load.workers(reader) == newest[reader.id]
    async with Load(fleet, oracle, streams=20) as load:
        await load.begun()
        assert await load.held_by(zombie)


async def test_short_freezes(fleet: Fleet, oracle: Oracle) -> None:
    """A worker that is stopped again and again, at any moment of what it does, for about as long as its
    lease, neither loses nor repeats a token, whether its jobs are still its own afterwards or not."""
    random = Random(1)
    names = cycle(fleet.worker_names)
    async with Load(fleet, oracle) as load:
        await load.begun()
        while load.running:
            name = next(names)
            fleet.freeze(name)
            await asyncio.sleep(LEASE_S * random.uniform(0.8, 1.2))  # the fault's length
            fleet.thaw(name)
            await asyncio.sleep(random.uniform(0, 0.2))  # and the pause between two


async def test_a_rolling_deploy(fleet: Fleet, oracle: Oracle) -> None:
    """New workers are started and each old one is told to go: its streams go on elsewhere at once, no try is
    used, no client sees an error, and it ends within 2 s of its current step."""
    old = fleet.worker_names
    # A request that had used a try would be given up by these.
    new = [fleet.add_worker("--max-tries", "1") for _ in old]
    for name in new:
        await asyncio.to_thread(fleet.await_worker, name)
    handed_over = 0
    async with Load(fleet, oracle, official=True) as load:
        for name in old:
            await load.begun(2)
            handed = await load.held_by(name)
            handed_over += len(handed)
            code, seconds = await exit_of(fleet.tell_to_go(name))
            assert code == 0
            for reader, worker in handed.items():
                assert await load.owner(reader) != worker
            assert seconds < 2
    assert handed_over
