"""One batch from claim to end: validated, run, written into its files, and cleaned up.

Each step begins with what Redis says, and ends with one script that says that it is done. So whoever takes a
batch over, at whichever moment, does again at most the step that was not finished.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial

from llmboost.jobs import new_id, now
from llmboost.streams import persist
from llmboost_api.batches.holding import RENEW_EVERY_S, BatchLost, Holding, Part
from llmboost_api.batches.record import ENDED, Batch, Problem, Status
from llmboost_api.batches.source import folder, insist, lines_of
from llmboost_api.batches.validation import Validated, validate
from llmboost_api.batches.work import Work
from llmboost_api.errors import ApiError
from llmboost_api.files.lines import Line
from llmboost_api.files.record import BATCH_OUTPUT, ID_PREFIX, FileRecord
from llmboost_api.files.storage import NoSuchObject
from llmboost_api.pod import Pod
from llmboost_api.protocol.form import ENDPOINTS, Endpoint

logger = logging.getLogger(__name__)

HAND_OVER_S = 5.0
"""Within which a runner that is told to go commits what it has."""
AGAIN_S = 5.0
"""After which a batch is taken up again that failed for a reason that nobody foresaw."""
REDIS_AWAY_S = 1.0
"""Between questions for a model."""


class Execution:
    """Runs one batch that is held. What has been done stays done, wherever it ends."""

    def __init__(self, pod: Pod, holding: Holding) -> None:
        self._pod = pod
        self._holding = holding
        self._cancelling = asyncio.Event()
        self._work: Work | None = None

    async def run(self) -> None:
        """Until the batch has ended, or another runner has it. Cancelled, it hands the batch over."""
        try:
            async with asyncio.TaskGroup() as group:
                beat = group.create_task(self._renew_forever())
                await self._steps()
                beat.cancel()
        except asyncio.CancelledError:
            await self._hand_over()
            raise
        except Exception as error:
            if await self._is_lost(error):
                logger.info("batch lost: batch=%s attempt=%d", self._holding.id, self._holding.attempt)
                await self._withdraw()
            else:  # a defect must neither end the runner nor go round as fast as it can
                logger.exception("batch failed, and is taken up again: batch=%s", self._holding.id)

    async def _renew_forever(self) -> None:
        while True:
            if await persist(self._holding.renew) == "cancelling":
                self._cancelling.set()
            await asyncio.sleep(RENEW_EVERY_S)

    async def _steps(self) -> None:
        batch = await persist(self._holding.get)
        if batch is not None and batch.progress.status not in ENDED:
            endpoint = next(each for each in ENDPOINTS if each.path == batch.record.endpoint)
            problems = await self._validate(batch, endpoint)
            if not problems:
                problems = await self._run(endpoint)
            await self._finish(batch, problems)
        await self._clean_up()

    # The steps

    async def _validate(self, batch: Batch, endpoint: Endpoint) -> list[Problem]:
        """Why it can't be run, if it can't."""
        if batch.progress.total or batch.progress.status == "cancelling":
            return []
        file_id = batch.record.input_file_id
        max_bytes = self._pod.settings.max_request_bytes
        lines = self._until_cancelled(lines_of(self._pod.files.storage, file_id, max_bytes))
        try:
            found: Validated = await validate(lines, endpoint, max_bytes, self._refusal_of)
        except NoSuchObject:
            logger.warning("no input: batch=%s storage=%s", batch.id, self._pod.files.storage.url)
            message = (
                f"The input file {file_id} was deleted, or expired, before it was validated. Upload it again."
            )
            return [Problem("input_file_not_found", message, param="input_file_id")]
        if self._cancelling.is_set():
            return []
        if not found.problems:
            await persist(partial(self._holding.begin, found.total, found.model))
        return found.problems

    async def _run(self, endpoint: Endpoint) -> list[Problem]:
        """Runs the lines; why they could not all be run, if they could not."""
        batch = await persist(self._holding.get)
        if batch is None or not batch.progress.total or batch.progress.all_done:
            return []
        self._work = Work(self._pod, self._holding, batch, endpoint, self._cancelling)
        problem = await self._work.run()
        return [] if problem is None else [problem]

    async def _finish(self, batch: Batch, problems: list[Problem]) -> None:
        """Puts the parts together, and ends the batch."""
        status: Status = "failed"
        if not problems:
            outcome = await persist(self._holding.finalize)
            if outcome is None:
                raise RuntimeError(f"{batch.id}: results were lost with the server of Redis; once more")
            status = outcome
        parts = await persist(self._holding.parts)
        try:
            output = await self._file(batch, "output", [part for part in parts if not part.failed])
            error = await self._file(batch, "error", [part for part in parts if part.failed])
        except NoSuchObject as missing:
            status, output, error = "failed", None, None
            message = f"The storage of files has lost results: {missing}. Make a new batch of the input."
            problems = [Problem("results_lost", message)]
        finish = partial(
            self._holding.finish,
            status,
            self._pod.settings.response_ttl,
            output=output,
            error=error,
            problems=problems,
            job=self._pod.webhooks.batch_event(batch.id, status),
        )
        await persist(finish)
        logger.info(
            "batch ended: batch=%s status=%s seconds=%.1f",
            batch.id,
            status,
            now() - batch.record.created,
        )

    async def _file(self, batch: Batch, kind: str, parts: list[Part]) -> FileRecord | None:
        """The bytes of a file that is not known to anyone yet; None if it would be empty."""
        if not parts:
            return None
        files = self._pod.files
        file_id = new_id(ID_PREFIX)
        await persist(partial(files.catalogue.reserve, batch.record.owner, file_id))
        size = await insist(partial(files.storage.concat, [part.name for part in parts], file_id))
        created = int(now())
        return FileRecord(
            id=file_id,
            bytes=size,
            created_at=created,
            filename=f"{batch.id}_{kind}.jsonl",
            purpose=BATCH_OUTPUT,
            owner=batch.record.owner,
            expires_at=created + batch.record.output_life,
        )

    async def _clean_up(self) -> None:
        await insist(partial(self._pod.files.storage.delete_all, folder(self._holding.id)))
        await persist(self._holding.forget)

    # What validation asks

    async def _until_cancelled(self, lines: AsyncIterator[Line]) -> AsyncIterator[Line]:
        async for line in lines:
            if self._cancelling.is_set():
                return
            yield line

    async def _refusal_of(self, model: str) -> str | None:
        """Why a model can't be asked for, if it can't."""
        while True:
            try:
                await self._pod.models.find(model)
            except ApiError as error:
                if error.status == 404:
                    return error.message
                await asyncio.sleep(REDIS_AWAY_S)
            else:
                return None

    # Endings that are none

    async def _hand_over(self) -> None:
        """Told to go: commits what there is and lets another runner go on at once, if there is more to do."""
        try:
            async with asyncio.timeout(HAND_OVER_S):
                batch = await persist(self._holding.get)
                if batch is None or batch.progress.status in ENDED:
                    await self._clean_up()
                    return
                if self._work is not None:
                    await self._work.save()
                await persist(self._holding.release)
        except (BatchLost, TimeoutError):
            pass
        except Exception:
            logger.exception("batch not handed over: batch=%s", self._holding.id)

    async def _is_lost(self, error: Exception) -> bool:
        """Whether another runner has the batch, which may show in many ways. If not, it is released."""
        if isinstance(error, ExceptionGroup) and error.subgroup(BatchLost):
            return True
        try:
            await persist(partial(self._holding.release, AGAIN_S))
        except BatchLost:
            return True
        return False

    async def _withdraw(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(HAND_OVER_S):
                if self._work is not None:
                    await self._work.withdraw()
