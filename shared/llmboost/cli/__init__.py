"""The command line: `llmboost`, and `lbh` as its second name.

Heavy imports wait until a command needs them: `llmboost --help` answers at once.
"""

import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command; never returns. Exit code 2: the command line or the environment is wrong."""
    from llmboost.cli import commands

    code = commands.run(list(sys.argv[1:] if argv is None else argv))
    if "torch" in sys.modules:
        # The command has closed all it had. Taking torch's modules apart in the interpreter's own order
        # takes seconds (7 of them on a busy machine), which a user at Ctrl-C would wait for.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
