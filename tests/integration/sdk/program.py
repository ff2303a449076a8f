"""Programs that use the SDK."""

import sys
import textwrap

from tests.commands import STANDINS, Command


def program(text: str, **env: str) -> Command:
    """A running one; the workers that it starts are stand-ins."""
    return Command([sys.executable, "-c", textwrap.dedent(text)], path=[STANDINS], env=env)
