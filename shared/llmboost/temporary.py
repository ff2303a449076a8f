"""A folder that goes with the process that made it, even if that is killed.

Run as a program, by its path and without site-packages, it is the one that waits for that end:
`python temporary.py FOLDER` removes the folder once it is sent a line or its standard input is closed, as the
system does for the dead. It imports nothing of llmboost.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class TemporaryFolder:
    """A new, empty folder among the temporary files, for this user alone.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, prefix: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._remover = subprocess.Popen(
            [sys.executable, "-P", "-S", "-E", __file__, str(self.path)],  # -P: our queue is not Python's
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C is for the parent alone
        )

    def close(self) -> None:
        """Removes it and all that it holds."""
        if self._remover.poll() is None:
            self._remover.communicate(b"\n")  # its input may have no end: a fork of ours holds it open
        shutil.rmtree(self.path, ignore_errors=True)  # should somebody have killed the other one


def main() -> None:
    """Outlives its parent by a moment."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.readline()
    folder = Path(sys.argv[1])
    for _ in range(50):  # whoever writes there may be dying still
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


if __name__ == "__main__":
    main()
