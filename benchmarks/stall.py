"""How long running streams wait for a token while a long prompt is computed beside them.

The engine in process: some sequences decode; when they have for a while, a prompt of 4,000 tokens comes. The
figure is the longest gap between two tokens of any of them, from then until that prompt's first token, over
the median gap before it came.

    python -m benchmarks.stall [--streams 1,4,16] [--prompt-tokens 4000] [--rounds 3]
"""

import itertools
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.child import Child
from benchmarks.engine import WORKERS_ENV
from benchmarks.models import VOCAB, smollm2
from llmboost.jobs import SamplingParams
from llmboost_worker.engine.interface import SequenceRequest, StepOutput

BEFORE = 40
"""Tokens of each stream before the prompt comes."""


class Stalled:
    """An engine with streams that are disturbed."""

    def __init__(self, model: str, **config: Any) -> None:
        from llmboost_worker.engine.transformers import EngineConfig, TransformersEngine

        self._engine = TransformersEngine(EngineConfig(model=model, **config))
        self._changed = threading.Condition()
        self._times: dict[str, list[float]] = {}
        self._failure: str | None = None
        self._rounds = 0
        self._engine.start(self._on_step, self._on_failure)

    def __call__(self, streams: int, prompt_tokens: int) -> dict[str, float]:
        """Seconds: the median gap before, the longest and the median gap beside, and to the first token."""
        self._rounds += 1
        names = [f"{self._rounds}-{i}" for i in range(streams)]
        self._engine.add([self._request(name, 32) for name in names])
        self._wait(lambda: all(len(self._times.get(name, ())) >= BEFORE for name in names))
        late, came = f"{self._rounds}-long", time.perf_counter()
        self._engine.add([self._request(late, prompt_tokens)])
        self._wait(lambda: late in self._times)
        self._engine.cancel([*names, late])
        ended = self._times[late][0]
        pairs = [pair for name in names for pair in itertools.pairwise(self._times[name])]
        before = [after - first for first, after in pairs if after <= came]
        beside = [after - first for first, after in pairs if came < after <= ended]
        return {
            "before": statistics.median(before),
            "longest": max(beside),
            "beside": statistics.median(beside),
            "first_token": ended - came,
        }

    def _request(self, id: str, prompt_tokens: int) -> SequenceRequest:
        draw = random.Random(id)
        ids = [draw.randint(1000, VOCAB - 1) for _ in range(prompt_tokens)]
        return SequenceRequest(id, ids, SamplingParams(temperature=0.0, ignore_eos=True), max_tokens=4000)

    def _wait(self, condition: Any) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure or condition())
        if self._failure:
            raise RuntimeError(self._failure)

    def _on_step(self, outputs: StepOutput) -> None:
        now = time.perf_counter()
        with self._changed:
            for output in outputs:
                self._failure = self._failure or output.error
                self._times.setdefault(output.id, []).append(now)
            self._changed.notify()

    def _on_failure(self, error: BaseException) -> None:
        with self._changed:
            self._failure = repr(error)
            self._changed.notify()


def stalled(model: Path, dtype: str, threads: int, **config: Any) -> Stalled:
    """For a `Child`."""
    return Stalled(str(model), dtype=dtype, threads=threads, **config)


def main() -> None:
    """Prints a table."""
    parser = results.parser(__doc__, rounds=3)
    parser.add_argument("--streams", type=results.numbers, default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        arguments = {"model": smollm2(), "dtype": dtype, "threads": options.threads}
        with Child(stalled, env=WORKERS_ENV, **arguments) as engine:
            engine.run(streams=1, prompt_tokens=200)
            for streams in options.streams:
                rounds = [
                    engine.run(streams=streams, prompt_tokens=options.prompt_tokens)
                    for _ in range(options.rounds)
                ]
                rows.append({"dtype": dtype, "streams": streams, "rounds": rounds})
                print(rows[-1], file=sys.stderr, flush=True)
    results.write(options.json, options, rows)
    names = ["precision", "streams", "gap before, ms", "longest beside", "of the one before"]
    names += ["median beside, of the one before", "the prompt's first token, s"]
    print(results.table(names, [_cells(row) for row in rows]))


def _cells(row: dict[str, Any]) -> list[Any]:
    def of(rounds: list[dict[str, float]], name: str, scale: float = 1.0) -> list[float]:
        return [each[name] * scale for each in rounds]

    rounds = row["rounds"]
    return [
        row["dtype"],
        row["streams"],
        results.spread(of(rounds, "before", 1000)),
        results.spread(of(rounds, "longest", 1000)),
        results.spread([each["longest"] / each["before"] for each in rounds]),
        results.spread([each["beside"] / each["before"] for each in rounds]),
        results.spread(of(rounds, "first_token")),
    ]


if __name__ == "__main__":
    main()
