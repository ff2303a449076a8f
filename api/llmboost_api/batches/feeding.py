"""Lines of a batch into the queue, a window of them at a time.

A line's ids are made of the batch's id and its number, and a job is submitted only if there is no stream of
its id. So a runner that takes a batch over submits all lines that are not known to be done, and joins those
that are under way.
"""

import asyncio
import logging
import time
from contextlib import suppress
from functools import partial

from llmboost import keys
from llmboost.entries import FollowUp
from llmboost.jobs import derived_id, now
from llmboost.registry import ModelCard
from llmboost.streams import persist
from llmboost_api import body, errors
from llmboost_api.batches.ledger import InFlight, Ledger, terminal_of
from llmboost_api.batches.lines import LineRefused, LineRequest, read_line
from llmboost_api.batches.output import Ending, Row, RowWriter
from llmboost_api.batches.pace import Pace
from llmboost_api.batches.record import Batch, Problem
from llmboost_api.batches.source import insist, line_at, lines_of
from llmboost_api.errors import ApiError
from llmboost_api.files.lines import Line
from llmboost_api.files.storage import NoSuchObject
from llmboost_api.pod import Pod
from llmboost_api.protocol.form import Endpoint
from llmboost_api.submission import Submission, make_submission

logger = logging.getLogger(__name__)

SMALLEST_WINDOW, LARGEST_WINDOW = 32, 1024
LOOK_EVERY_S = 2.0
"""How old the number of the workers' slots may be."""
MODEL_AWAY_S = 1.0
"""Between looks for a model that no worker serves at the moment."""
NOT_IN_BATCHES = {"store": False, "background": False}
"""Of a request that has these: what a batch answers is kept in its files, and nobody waits for it anyway."""
OUTLIVES_S = 86400.0
"""How long after the end of a batch the result of a line is kept for a runner that comes late."""


class Feeder:
    """Begins the lines of one batch."""

    def __init__(self, pod: Pod, batch: Batch, endpoint: Endpoint, ledger: Ledger) -> None:
        self._pod = pod
        self._record = batch.record
        self._total = batch.progress.total
        self._endpoint = endpoint
        self._ledger = ledger
        self._writer = RowWriter(batch.id)
        self._max_bytes = pod.settings.max_request_bytes
        self._models: set[str] = set()
        self._window = SMALLEST_WINDOW
        self._look_at = 0.0

    async def run(self, done: bytes) -> None:
        """Begins every line that is not in the bitmap `done`. If the input is gone, the ledger says so."""
        pace = Pace()
        try:
            async for line in lines_of(self._pod.files.storage, self._record.input_file_id, self._max_bytes):
                if line.number > self._total:
                    break
                if not has_line(done, line.number):
                    await self._room()
                    await self._begin(line)
                await pace.rest()
        except NoSuchObject:
            self._lose_input()
        self._ledger.fed = True
        self._ledger.changed()

    async def begin_again(self, lost: InFlight) -> None:
        """Submits a line whose stream is gone, with the server that had it."""
        logger.warning("stream lost, line begun again: batch=%s line=%d", self._record.id, lost.number)
        read = partial(
            line_at,
            self._pod.files.storage,
            self._record.input_file_id,
            number=lost.number,
            offset=lost.offset,
            max_bytes=self._max_bytes,
        )
        try:
            await self._begin(await insist(read))
        except NoSuchObject:
            self._lose_input()
        # It stays in flight until it is so again, or has its row: or the work would seem to be done.
        if self._ledger.of_job(lost.jobs[0]) is lost:
            self._ledger.end(lost)

    async def give_up(self, line: InFlight, ending: Ending) -> None:
        """Ends the jobs of a line in flight."""
        for job_id in line.jobs:
            await persist(partial(self._pod.queue.cancel, job_id, terminal_of(ending, self._pod.id)))

    def _lose_input(self) -> None:
        file_id = self._record.input_file_id
        logger.warning("no input: batch=%s storage=%s", self._record.id, self._pod.files.storage.url)
        self._ledger.problem = Problem(
            "input_file_not_found",
            f"The input file {file_id} was deleted, or expired, before all of its lines were run. "
            "Keep the file until the batch has ended.",
            param="input_file_id",
        )

    # One line

    async def _begin(self, line: Line) -> None:
        try:
            request = read_line(line, self._endpoint, self._max_bytes)
        except LineRefused as refused:  # It was validated by a pod with another limit.
            error = ApiError(400, refused.problem.message, code=refused.problem.code)
            self._refuse(line.number, "", error)
            return
        submission = await self._submission(request)
        if isinstance(submission, ApiError):
            self._refuse(request.number, request.custom_id, submission)
        elif submission is None:
            ending = self._ledger.ending
            assert ending is not None
            data = self._writer.not_run(request.number, request.custom_id, ending)
            self._ledger.add(Row(request.number, data, ending, failed=True))
        else:
            await self._submit(request, line.offset, submission)

    async def _submission(self, request: LineRequest) -> Submission | ApiError | None:
        """The jobs of a line; or why it can't have any; None: nothing more is to be run."""
        if self._ledger.ending is not None:
            return None
        completion_id = self._completion_id(request.number)
        try:
            fields = self._endpoint.request.model_fields
            ignored = {name: value for name, value in NOT_IN_BATCHES.items() if name in fields}
            asked = body.check({**request.body, **ignored}, self._endpoint.request)
            card = await self._card(asked.model)
            if card is None:
                return None
            return make_submission(
                self._pod,
                self._endpoint,
                completion_id,
                card,
                asked,
                asked.prompts(),
                owner=self._record.owner,
                job_class="batch",
                needs_audience=False,
                deadline=self._record.deadline,
                follow_up=FollowUp(
                    retention=max(0.0, self._record.deadline - now()) + OUTLIVES_S,
                    push_to=keys.batch_sealed(self._record.id),
                ),
            )
        except ApiError as error:
            return error
        except Exception:  # one line must not keep the others from being run
            logger.exception("internal error: batch=%s line=%d", self._record.id, request.number)
            return errors.internal(completion_id)

    async def _submit(self, request: LineRequest, offset: int, submission: Submission) -> None:
        jobs = tuple(job.id for job in submission.jobs)
        line = InFlight(request.number, offset, request.custom_id, submission.id, jobs)
        self._ledger.begin(line)
        for job in submission.jobs:
            await persist(
                partial(
                    self._pod.queue.submit,
                    job,
                    form=submission.form.encode(),
                    follow_up=submission.follow_up,
                )
            )
        line.submitted = True
        self._ledger.changed()
        if self._ledger.ending is not None:
            await self.give_up(line, self._ledger.ending)

    def _refuse(self, number: int, custom_id: str, error: ApiError) -> None:
        """The endpoint's own answer to a request that it does not take."""
        told = ApiError(
            error.status,
            f"Line {number}: {error.message}",
            type=error.type,
            code=error.code,
            param=error.param,
        )
        data = self._writer.response(number, custom_id, self._completion_id(number), told.status, told.body())
        self._ledger.add(Row(number, data, failed=True))

    def _completion_id(self, number: int) -> str:
        return derived_id(self._endpoint.prefix, self._record.id, number)

    # When

    async def _room(self) -> None:
        """Waits until one more may be begun."""
        if time.monotonic() >= self._look_at:
            self._window = await self._slots()
            self._look_at = time.monotonic() + LOOK_EVERY_S
        ledger = self._ledger
        await ledger.until(
            lambda: (ledger.ending is not None or len(ledger) < self._window) and not ledger.rows.full
        )

    async def _slots(self) -> int:
        """Enough to keep every worker busy: another line waits for each that runs."""
        workers = await persist(self._pod.registry.workers)
        slots = sum(worker.max_num_seqs for worker in workers if worker.model in self._models)
        return min(max(2 * slots, SMALLEST_WINDOW), LARGEST_WINDOW)

    async def _card(self, model: str) -> ModelCard | None:
        """Waits for the model, which was served when the batch was validated; None if that has no point."""
        ledger = self._ledger
        while ledger.ending is None:
            try:
                card = await self._pod.models.find(model)
            except ApiError:  # No worker for minutes, or no Redis.
                with suppress(TimeoutError):
                    async with asyncio.timeout(MODEL_AWAY_S):
                        await ledger.until(lambda: ledger.ending is not None)
            else:
                if card.root not in self._models:
                    self._models.add(card.root)
                    self._look_at = 0.0
                return card
        return None


def has_line(bitmap: bytes, number: int) -> bool:
    """Whether the line's bit is set, as Redis numbers them."""
    byte, place = divmod(number - 1, 8)
    return byte < len(bitmap) and bool(bitmap[byte] & (0x80 >> place))
