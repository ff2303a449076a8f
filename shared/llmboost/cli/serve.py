"""`llmboost serve`: everything in one command."""

import json
import shlex
import signal
import sys
from types import FrameType

from llmboost.processes import Processes, ProcessesError
from llmboost.settings import ServeSettings

PROMPT = "Write a short story about AI, in 100 words."


def serve(settings: ServeSettings) -> int:
    """Runs everything until told to stop; returns the exit code.

    The first Ctrl-C (or SIGTERM) drains, the second ends at once.
    """
    processes = Processes(settings, log=_log)
    signals = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            processes.request_stop()
        else:
            processes.request_kill()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, on_signal)
    try:
        if processes.start():
            print(banner(settings, processes.url, processes.model), flush=True)
            processes.wait()
    except ProcessesError:
        pass  # kept in `failure`
    if processes.failure:
        print(f"llmboost serve: error: {processes.failure}", file=sys.stderr)
        return 1
    return 130 if signals > 1 else 0


def banner(settings: ServeSettings, url: str, model: str) -> str:
    """Where it is, and a line to paste for a first answer."""
    body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "stream": True}
    command = ["curl", "-N", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    # The key itself stays out of logs; double quotes, so that the shell puts it in.
    key = ' -H "Authorization: Bearer $LLMBOOST_API_KEY"' if settings.api_key else ""
    line = f"{shlex.join(command)}{key} -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    return f"\n{model} is served at {url}/v1\n\n{line}\n"


def _log(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
