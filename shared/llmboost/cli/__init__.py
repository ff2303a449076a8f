"""The command line: `llmboost`, and `lbh` as its second name.

Heavy imports wait until a command needs them: `llmboost --help` answers at once.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command; never returns. Exit code 2: the command line or the environment is wrong."""
    from llmboost.cli import commands

    sys.exit(commands.run(list(sys.argv[1:] if argv is None else argv)))
