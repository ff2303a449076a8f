"""Runs a command that ends when its parent does, even if the parent is killed.

Usage: python leash.py PARENT_PID SIGNAL COMMAND…

Started by its path and without site-packages, it imports nothing of llmboost and becomes COMMAND within
milliseconds. A `preexec_fn` would do the same, but isn't safe in a parent that has threads.

Linux only: elsewhere COMMAND runs without a leash, and outlives a parent that is killed with SIGKILL.
"""

import os
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ties this process to its parent, then becomes the command."""
    parent, signal = int(sys.argv[1]), int(sys.argv[2])
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0)
    if os.getppid() != parent:  # it died before the leash was on
        sys.exit(1)
    os.execvp(sys.argv[3], sys.argv[3:])


if __name__ == "__main__":
    main()
