"""`llmboost batch run`: upload, begin, watch, download."""

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from llmboost.cli.batch.options import DEFAULT_URL, STANDARD, RunOptions
from llmboost.cli.batch.outputs import written
from llmboost.cli.batch.private import private_server
from llmboost.cli.batch.progress import progress
from llmboost.cli.batch.server import Batch, NoServer, Server, ServerError
from llmboost.cli.batch.source import Source, basename, opened
from llmboost.cli.flags import UsageError
from llmboost.processes import Processes, ProcessesError

POLL_S = 1.0
INTERRUPTED = 130
_PROBLEMS_SHOWN = 20


def run(options: RunOptions) -> int:
    """Runs a batch, or watches one that runs; returns the exit code.

    Raises:
        UsageError: the input is wrong.
        NoServer, ServerError, ProcessesError: it could not be done; say why.
    """
    with ExitStack() as stack:
        source = None if options.input is None else stack.enter_context(opened(options.input))
        server, private = _reach(options, source, stack)
        return _Run(options, server, private)(source)


def _reach(options: RunOptions, source: Source | None, stack: ExitStack) -> tuple[Server, Processes | None]:
    """The server that is named, or one of our own."""
    server = stack.enter_context(Server(options.server, _say))
    try:
        server.check()
        return server, None
    except NoServer as reason:
        url = options.server.url
        if options.server.chosen or source is None:
            raise NoServer(
                f"nothing answers at {url} ({reason}): name a server with --url, or start one: llmboost serve"
            ) from None
    model = options.model or source.model
    if model is None:
        raise UsageError(
            f"nothing answers at {url}, and the first line names no model to start a server with: "
            "give --url or --model"
        )
    _say(f"no server at {url}: {model} is served for this run alone, and then stopped")
    private = stack.enter_context(private_server(model, options.server.api_key))
    own = replace(options.server, url=f"{private.url}/v1")
    return stack.enter_context(Server(own, _say)), private


class _Run:
    def __init__(self, options: RunOptions, server: Server, private: Processes | None) -> None:
        self.options = options
        self.server = server
        self.private = private
        self._reason = ""
        self._latest: Batch
        """As it was last seen."""
        server.on_wait = self._wait(self._say_away)

    def __call__(self, source: Source | None) -> int:
        begun = self.server.retrieve(self.options.batch_id or "") if source is None else self._begin(source)
        self._latest = begun
        try:
            return self._finish(self._watch(begun))
        except KeyboardInterrupt:
            if self.private is None:
                self._say_how_to_come_back(self._latest)
            else:
                self._end_early(self._latest)
            return INTERRUPTED

    def _begin(self, source: Source) -> Batch:
        endpoint = self.options.endpoint or source.endpoint
        if not endpoint:
            raise UsageError(f"the first line of {source.name} names no url, such as /v1/chat/completions")
        file_id = self.server.upload(basename(self.options.input or STANDARD), source.file)
        batch = self.server.create(file_id, endpoint, self.options.window, self.options.metadata)
        _say(f"{source.name}: {source.lines} lines are {batch.id} at {self.server.options.url}")
        return batch

    def _watch(self, batch: Batch) -> Batch:
        with progress() as shown:
            self.server.on_wait = self._wait(shown.wait)
            shown.show(batch)
            while not batch.ended:
                time.sleep(POLL_S)
                batch = self._latest = self.server.retrieve(batch.id)
                shown.show(batch)
        self.server.on_wait = self._wait(self._say_away)
        return batch

    def _finish(self, batch: Batch) -> int:
        """Downloads what there is, and says what there is."""
        counts = batch.counts
        if batch.status == "failed":
            self._say_problems(batch)
            return 1
        with written(self.options.output) as file:
            if batch.output_file_id is not None:
                self.server.download(batch.output_file_id, file)
        where = "" if self.options.output == STANDARD else f" in {self.options.output}"
        report = f"{batch.id}: {counts.completed} of {counts.total} lines answered{where}"
        if batch.error_file_id is not None:
            errors = str(self.options.errors_path)
            with written(errors) as file:
                self.server.download(batch.error_file_id, file)
            report += f"; the others, with the reasons, in {errors}"
        _say(report if batch.status == "completed" else f"{report}; the batch is {batch.status}")
        return 0 if batch.status == "completed" and counts.completed == counts.total else 1

    def _say_away(self, reason: str) -> None:
        if reason != self._reason:
            self._reason = reason
            _say(f"the server is away, asking again: {reason}")

    def _say_problems(self, batch: Batch) -> None:
        problems = (batch.errors.data if batch.errors else None) or []
        name = self.options.input or "the input"
        for problem in problems[:_PROBLEMS_SHOWN]:
            where = name if problem.line is None else f"{name}:{problem.line}"
            _say(f"{where}: {problem.message}")
        if len(problems) > _PROBLEMS_SHOWN:
            _say(f"and {len(problems) - _PROBLEMS_SHOWN} more: {self._command('show', batch)}")
        _say(f"{batch.id} was not run: the input is wrong")

    def _say_how_to_come_back(self, batch: Batch) -> None:
        if batch.ended:
            _say(f"\n{batch.id} has ended. To fetch the answers:")
        else:
            _say(f"\n{batch.id} goes on at the server. To watch it again, or to end it:")
        output = ["--batch-id", batch.id, "-o", self.options.output]
        if self.options.errors is not None:
            output += ["--errors", str(self.options.errors)]
        _say(f"  llmboost batch run {shlex.join(output)}{self._at}")
        if not batch.ended:
            _say(f"  {self._command('cancel', batch)}")

    def _end_early(self, batch: Batch) -> None:
        """Nobody but us can come back to it: keep what is done."""
        _say(f"\nending {batch.id}; what is done is kept. Ctrl-C again: it is not")
        if not batch.ended:
            try:
                batch = self.server.cancel(batch.id)
            except ServerError as error:
                if error.status != 409:  # it has ended meanwhile
                    raise
        self._finish(self._watch(batch))

    def _command(self, command: str, batch: Batch) -> str:
        return f"llmboost batch {command} {batch.id}{self._at}"

    @property
    def _at(self) -> str:
        """The URL as a flag, if it is needed. The key stays out of sight."""
        url = self.options.server.url
        return "" if url == DEFAULT_URL else f" --url {shlex.quote(url)}"

    def _wait(self, show: Callable[[str], None]) -> Callable[[str], None]:
        """What the server is waited for with; not in vain, if it was ours and has given up."""

        def wait(reason: str) -> None:
            if self.private is not None and self.private.failure is not None:
                raise ProcessesError(str(self.private.failure))
            show(reason)

        return wait


def _say(line: str) -> None:
    print(line, file=sys.stderr)
