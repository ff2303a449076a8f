"""Takes one guarantee away at a time and lists the tests that notice.

    python -m tests.faults.mutation [--only NAME] [--faults]

First the tests that run in seconds, in a process that has the defect; what these miss, or everything with
`--faults`, is put to `tests/faults`, whose pods and workers have it. Ends non-zero if nobody notices.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from tests.faults.mutants import MUTANTS, VARIABLE

PROGRAM_VARIABLE = "LLMBOOST_TEST_PROGRAM"
"""See `tests.commands.PROGRAM`."""
PLUGIN = "tests.faults.mutants"
QUICK = (
    "tests/integration/test_protocol.py",
    "tests/integration/test_streams.py",
    "tests/integration/test_queue.py",
    "tests/integration/test_queue_deaths.py",
    "tests/integration/test_tailer.py",
    "tests/integration/test_generation.py",
    "tests/integration/test_worker.py",
    "tests/integration/test_worker_leases.py",
    "tests/integration/test_worker_goes.py",
    "tests/unit/test_engine_resume.py",
)
NAMES = ("tests/integration/test_api_idempotency.py",)
RUNNERS = ("tests/integration/test_batch_deaths.py",)
TELLING = ("tests/integration/test_webhooks.py",)
QUICK_OF = {
    "nothing follows": ("tests/integration/test_streams.py", *NAMES, *TELLING),
    "names taken twice": NAMES,
    "names of no answer": NAMES,
    "anybody commits": RUNNERS,
    "lines not marked": RUNNERS,
    "commits count twice": RUNNERS,
    "gives way at once": ("tests/integration/test_priorities.py",),
    "each telling an event": TELLING,
}
"""Of these defects it is known where they show, if anywhere: the rest need not be tried."""
FAULTS = ("tests/faults/test_workers.py", "tests/faults/test_redis.py", "tests/faults/test_pods.py")
FAULTS_OF = {
    "names taken twice": ("tests/faults/test_retries.py::test_requests_sent_again_are_answered_once",),
    "fence off": ("tests/faults/test_workers.py::test_a_frozen_worker",),
    "NOMKSTREAM off": ("tests/faults/test_redis.py::test_restarted_empty",),
    "seal off": ("tests/faults/test_workers.py::test_a_killed_worker",),
}
"""Of these defects one fault is known to show: the others, minutes of them, need not be tried."""
ENOUGH = 4
"""Tests that fail, after which a run ends."""


def failing(tests: Sequence[str], mutant: str = "", *, processes: bool = False) -> list[str]:
    """Names of the tests that fail or break off; with `processes`, only those that they start have it."""
    env = dict(os.environ)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *tests]
    command += ["-k", "not without_its_guarantees"]  # which makes mutants of its own
    command += ["--maxfail", str(ENOUGH), "--timeout", "300" if processes else "60"]
    if mutant:
        env[VARIABLE] = mutant
        if processes:
            env[PROGRAM_VARIABLE] = PLUGIN
        else:
            command += ["-p", PLUGIN]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    found = re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return list(dict.fromkeys(found))


def main() -> int:
    """Prints a table; returns the number of mutants that survive."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=MUTANTS, help="of these mutants")
    parser.add_argument("--faults", action="store_true", help="the fault tests in any case")
    options = parser.parse_args()
    names = options.only or list(MUTANTS)
    quick = [test for name in names for test in QUICK_OF.get(name, QUICK)]
    healthy = failing(list(dict.fromkeys(quick)))
    if healthy:
        print(f"fail without any mutant, so they say nothing: {', '.join(healthy)}", file=sys.stderr)
    print("| without | takes away | noticed by |\n|---|---|---|", flush=True)
    survivors = 0
    for name in names:
        caught = [test for test in failing(QUICK_OF.get(name, QUICK), name) if test not in healthy]
        if options.faults or not caught:
            caught += failing(FAULTS_OF.get(name, FAULTS), name, processes=True)
        survivors += not caught
        tests = ", ".join(f"`{test}`" for test in caught)
        print(f"| {name} | {MUTANTS[name].takes_away} | {tests or '**SURVIVED**'} |", flush=True)
    return survivors


if __name__ == "__main__":
    sys.exit(main())
