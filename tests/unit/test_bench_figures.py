"""`llmboost bench`: figures of requests whose times are known."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from llmboost.cli.bench import arrivals
from llmboost.cli.bench.client import Client
from llmboost.cli.bench.record import Record
from llmboost.cli.bench.summary import percentile, summarize
from llmboost.cli.bench.wire import Connections, Reply, TakeBody, WireError

CHUNK = b'data: {"choices":[{"text":"x"}]}\n\n'
END = b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'


def usage(completion: int) -> bytes:
    return b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":%d}}\n\n' % completion


Scripted = Callable[..., Record]


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """The record of a request that is sent at 100 s, and whose answer is read at these times."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run(*reads: tuple[float, bytes], fails: WireError | None = None, status: int = 200) -> Record:
        clock[0] = 100.0

        async def ask(self: Connections, request: bytes, take: TakeBody | None = None) -> Reply:
            reply = Reply(take)
            reply.status = status
            reply.content_type = "text/event-stream"
            for at, data in reads:
                clock[0] = at
                reply.add(data, at)
            if fails is not None:
                raise fails
            return reply

        monkeypatch.setattr(Connections, "ask", ask)
        return asyncio.run(Client("http://server/v1", None, 60).stream("/completions", {}))

    return run


def test_latencies_are_those_of_the_reads(streamed: Scripted) -> None:
    record = streamed((100.25, CHUNK), (100.35, CHUNK), (100.55, CHUNK), (100.6, END + usage(3)))
    assert record.error is None
    assert record.ttft == pytest.approx(0.25)
    assert record.gaps == pytest.approx([0.1, 0.2])
    assert record.tpot == pytest.approx(0.15)
    assert record.e2e == pytest.approx(0.6)


def test_tokens_are_those_of_the_usage_and_not_the_chunks(streamed: Scripted) -> None:
    """Five tokens in two chunks that came in one read."""
    record = streamed((100.1, CHUNK), (100.5, CHUNK * 2 + usage(9) + END))
    assert record.output_tokens == 9
    assert record.chunks == [1, 2]
    assert record.gaps == pytest.approx([0.4])
    assert record.tpot == pytest.approx(0.05)
    figures = summarize([record], 100, 101)
    assert figures["output_tokens_per_s"] == pytest.approx(9)
    assert figures["total_tokens_per_s"] == pytest.approx(14)
    assert figures["counted_by"] == "usage"
    assert figures["itl_ms"]["p50"] == pytest.approx(400)


def test_chunks_are_counted_where_there_is_no_usage(streamed: Scripted) -> None:
    record = streamed((100.1, CHUNK), (100.5, CHUNK * 2 + END))
    assert record.output_tokens == 3
    assert summarize([record], 100, 101)["counted_by"] == "chunks"


def test_what_fails_is_counted_by_its_kind_and_in_no_other_figure(streamed: Scripted) -> None:
    records = [
        streamed((100.1, CHUNK), (100.2, END + usage(1))),
        streamed((100.1, CHUNK), fails=WireError("connection lost", "in the middle")),
        streamed((100.1, CHUNK), fails=WireError("connection lost", "again")),
        streamed((100.1, CHUNK)),
        streamed((100.1, CHUNK + b'data: {"error":{"message":"no memory"}}\n\n')),
        streamed((100.1, b'{"error":{"message":"slow down"}}'), status=429),
    ]
    figures = summarize(records, 100, 102)
    assert figures["requests"] == {"ok": 1, "failed": 5}
    assert figures["requests_per_s"] == pytest.approx(0.5)
    assert figures["output_tokens"] == 1
    assert figures["ttft_ms"]["count"] == 1
    assert figures["errors"][0] == {"kind": "connection lost", "count": 2, "message": "in the middle"}
    assert {(error["kind"], error["message"]) for error in figures["errors"][1:]} == {
        ("ended early", "the stream ended without [DONE] or a finish_reason"),
        ("error in the stream", "no memory"),
        ("status 429", "slow down"),
    }


def test_an_answer_without_text_is_an_answer(streamed: Scripted) -> None:
    figures = summarize([streamed((100.2, END + usage(1)))], 100, 101)
    assert figures["requests"] == {"ok": 1, "failed": 0}
    assert figures["ttft_ms"] is None
    assert figures["output_tokens"] == 1


def test_percentiles_are_numpys() -> None:
    values = [float(number * number) for number in range(1, 24)]
    exact = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (50, 90, 99):
        assert percentile(values, percent) == pytest.approx(exact[percent - 1])
    assert (percentile([3.0], 99), percentile(values, 0), percentile(values, 100)) == (3.0, 1.0, 529.0)


def test_a_request_is_good_if_it_is_within_all_limits(streamed: Scripted) -> None:
    fast = streamed((100.1, CHUNK), (100.2, CHUNK + END + usage(2)))
    late = streamed((100.3, CHUNK), (100.31, CHUNK + END + usage(2)))
    slow = streamed((100.1, CHUNK), (100.9, CHUNK + END + usage(2)))
    for slo, good in [({"ttft": 200.0}, 2), ({"tpot": 200.0}, 2), ({"ttft": 200.0, "itl": 150.0}, 1)]:
        figures = summarize([fast, late, slow], 100, 102, slo)
        assert figures["goodput"]["requests"] == good
        assert figures["goodput"]["requests_per_s"] == good / 2


def test_the_timeline_holds_every_token(streamed: Scripted) -> None:
    records = [
        streamed((100.1, CHUNK), (100.2, CHUNK * 2 + END + usage(9))),
        streamed((104.9, CHUNK), (105.0, CHUNK + END + usage(4))),
    ]
    line = summarize(records, 100, 105)["timeline"]
    assert sum(line["tokens_per_s"]) * line["step_s"] == pytest.approx(13)
    assert line["tokens_per_s"][2] * line["step_s"] == pytest.approx(3)


def test_arrivals_at_a_rate_are_the_same_for_a_seed_and_poissons() -> None:
    def first(count: int, **changed: Any) -> list[float]:
        wanted = {"rate": 50.0, "burstiness": 1.0, "seed": "7", **changed}
        times = arrivals.times(**wanted)
        return [next(times) for _ in range(count)]

    assert first(100) == first(100)
    assert first(100) != first(100, seed="8")
    for burstiness in (0.5, 1.0, 4.0):
        times = first(4000, burstiness=burstiness)
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.1)
        spread = statistics.stdev(gaps) / statistics.mean(gaps)
        assert spread == pytest.approx(burstiness**-0.5, rel=0.1)
