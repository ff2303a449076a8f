"""A child process: in a group of its own, on a leash, its log prefixed and its last words kept."""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_LEASH = Path(__file__).with_name("leash.py")
_TAIL_LINES = 40

Log = Callable[[str], None]


def silent(line: str) -> None:
    """A log that goes nowhere."""


class Child:
    """A process that can be started again after it has ended.

    It ends with this process, whatever ends that; precisely, with the thread that called `start`, since
    that is what Linux watches. So start it in a thread that lives as long as it should.

    `parting`: the signal that reaches it when this process is gone.
    `on_exit`: called from another thread whenever the process has ended.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        parting: signal.Signals = signal.SIGKILL,
        log: Log = silent,
        on_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.command = command
        self.env = env
        self.cwd = cwd
        self.parting = parting
        self._log = log
        self._on_exit = on_exit
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        self._ended.set()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    @property
    def running(self) -> bool:
        """True from `start` until the process and all of its group have ended and its log is read."""
        return not self._ended.is_set()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """Of the last run; negative: the signal that ended it. None while it runs."""
        return self._process.returncode if self._process and not self.running else None

    @property
    def tail(self) -> str:
        """The last lines it has logged in this run."""
        return "\n".join(self._tail)

    def start(self, *, stdin: bytes = b"", pass_fds: Sequence[int] = ()) -> None:
        """Starts it; the files in `pass_fds` stay open in it."""
        assert not self.running
        self._tail.clear()
        leash = [sys.executable, "-S", "-E", str(_LEASH), str(os.getpid()), str(int(self.parting))]
        self._process = subprocess.Popen(
            [*leash, *self.command],
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.env,
            cwd=self.cwd,
            pass_fds=pass_fds,
            start_new_session=True,  # the terminal's Ctrl-C is for the parent alone
        )
        self._ended.clear()
        reader = threading.Thread(target=self._read_log, args=(self._process,), daemon=True)
        reader.start()
        threading.Thread(target=self._await_end, args=(self._process, reader), daemon=True).start()
        if self._process.stdin:
            with suppress(BrokenPipeError), self._process.stdin:
                self._process.stdin.write(stdin)

    def terminate(self) -> None:
        """Asks it to end. Not its group: what it has started is its own to stop."""
        if self.running and self._process:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and its group at once."""
        if self.running and self._process:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it has ended; false if it still runs after `timeout` seconds."""
        return self._ended.wait(timeout)

    def _read_log(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        for raw in process.stdout:
            # Of a progress bar that redraws its line, the final state.
            line = raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
            self._tail.append(line)
            # A log that can't be written any more must not stop the reading: the child would block.
            with suppress(OSError, ValueError):
                self._log(f"[{self.name}] {line}")

    def _await_end(self, process: subprocess.Popen[bytes], reader: threading.Thread) -> None:
        process.wait()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever it left behind, which may hold its log open
        reader.join(timeout=2)
        self._ended.set()
        self._on_exit()
