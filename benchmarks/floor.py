"""The floor: the engine in process beside the model's bare forward on the same batch.

The bare side is transformers' own model with its own cache and scaled dot-product attention: one forward
over all prompts, then forward and argmax until all answers are there. It schedules nothing and knows neither
sampling nor ends: what a server does around that forward can only add to it. Both have a process of their own
and the same number of threads, and run in turns.

    python -m benchmarks.floor [--batches 16,32] [--contexts 64,256,1024] [--tokens 64] [--rounds 3]
"""

import itertools
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.child import Child
from benchmarks.engine import WORKERS_ENV, Run, in_process
from benchmarks.models import VOCAB, smollm2


def bare(model: Path, dtype: str, threads: int) -> Callable[..., Run]:
    """For a `Child`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def run(prompts: list[list[int]], max_tokens: int) -> Run:
        began = time.perf_counter()
        ids, cache, ends = torch.tensor(prompts), None, []
        for _ in range(max_tokens):
            out = network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            ids.tolist()  # whoever runs a server wants to know them
            ends.append(time.perf_counter())
        steps = [after - before for before, after in itertools.pairwise(ends)]
        first = [ends[0] - began] * len(prompts)
        return Run(ends[-1] - began, max_tokens * len(prompts), first, steps)

    return run


def main() -> None:
    """Prints a table; ratios above 1 are in the engine's favour."""
    parser = results.parser(__doc__, rounds=3)
    parser.add_argument("--batches", type=results.numbers, default=[16, 32], help="sequences at a time")
    parser.add_argument(
        "--contexts", type=results.numbers, default=[64, 256, 1024], help="tokens of a prompt"
    )
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        arguments = {"model": smollm2(), "dtype": dtype, "threads": options.threads}
        with Child(in_process, env=WORKERS_ENV, **arguments) as engine, Child(bare, **arguments) as floor:
            warm = _prompts(4, 32, "warm")
            engine.run(prompts=warm, max_tokens=[8] * 4, concurrency=4)
            floor.run(prompts=warm, max_tokens=8)
            for context in options.contexts:
                for batch in options.batches:
                    row = _measure(engine, floor, batch, context, options)
                    rows.append({"dtype": dtype, **row})
                    print(f"{dtype}, {batch} x {context}: {row['ratio']}", file=sys.stderr, flush=True)
    results.write(options.json, options, rows)
    print(_table(rows))


def _measure(engine: Child, floor: Child, batch: int, context: int, options: Any) -> dict[str, Any]:
    ours: list[Run] = []
    theirs: list[Run] = []
    for number in range(options.rounds):
        # New ones each time: the engine may keep prefixes, which the other side can't.
        prompts = _prompts(batch, context, f"{batch} {context} {number}")
        theirs.append(floor.run(prompts=prompts, max_tokens=options.tokens))
        ours.append(engine.run(prompts=prompts, max_tokens=[options.tokens] * batch, concurrency=batch))
    return {
        "batch": batch,
        "context": context,
        "tokens_per_s": {"engine": _speeds(ours), "floor": _speeds(theirs)},
        "step_ms": {"engine": _steps(ours), "floor": _steps(theirs)},
        "first_token_s": {"engine": _firsts(ours), "floor": _firsts(theirs)},
        "ratio": {
            "tokens_per_s": round(results.ratio(_speeds(ours), _speeds(theirs)), 3),
            "decode": round(results.ratio(_steps(theirs), _steps(ours)), 3) if _steps(ours) else None,
            "prefill": round(results.ratio(_firsts(theirs), _firsts(ours)), 3),
        },
    }


def _prompts(count: int, length: int, seed: str) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randint(1000, VOCAB - 1) for _ in range(length)] for _ in range(count)]


def _speeds(runs: list[Run]) -> list[float]:
    return [run.tokens_per_s for run in runs]


def _steps(runs: list[Run]) -> list[float]:
    """Of each round the median, in milliseconds. A round has none, if the first sequences have ended when the
    last prompt has been computed."""
    return [1000 * sorted(run.steps)[len(run.steps) // 2] for run in runs if run.steps]


def _firsts(runs: list[Run]) -> list[float]:
    """Until the last of a batch had its first token."""
    return [max(run.ttft) for run in runs]


def _table(rows: list[dict[str, Any]]) -> str:
    names = ["precision", "sequences", "context", "tok/s: engine", "floor", "ratio"]
    names += ["ms a step: engine", "floor", "ratio", "ratio of prefill"]
    return results.table(
        names,
        [
            [
                row["dtype"],
                row["batch"],
                row["context"],
                results.spread(row["tokens_per_s"]["engine"]),
                results.spread(row["tokens_per_s"]["floor"]),
                row["ratio"]["tokens_per_s"],
                results.spread(row["step_ms"]["engine"]) if row["step_ms"]["engine"] else "",
                results.spread(row["step_ms"]["floor"]),
                row["ratio"]["decode"] or "",
                row["ratio"]["prefill"],
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
