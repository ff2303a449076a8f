"""Ending a completion by its id, from any pod: cancelling it, and deleting what there is of it."""

from functools import partial

from llmboost.entries import CANCELLED_TYPE, StreamError, Terminal
from llmboost.streams import SealOutcome
from llmboost_api.jobs import job_ids
from llmboost_api.patience import answered
from llmboost_api.pod import Pod
from llmboost_api.protocol.form import Endpoint, Form
from llmboost_api.retrieval import find

CANCELLED = StreamError("The request was cancelled by its id.", CANCELLED_TYPE, "cancelled", status=499)
"""In which a cancelled stream ends."""


async def cancel(pod: Pod, endpoint: Endpoint, completion_id: str, asker: str) -> bool:
    """Ends a completion at its next token; false if it had ended.

    Raises:
        ApiError: there is no such completion for this key (404, 410), or Redis can't be asked (503).
    """
    form = await find(pod, endpoint, completion_id, asker)
    return await end(pod, completion_id, form)


async def delete(pod: Pod, endpoint: Endpoint, completion_id: str, asker: str) -> None:
    """Forgets a completion; one that still runs is cancelled.

    Raises:
        ApiError: as `cancel`.
    """
    form = await find(pod, endpoint, completion_id, asker)
    await end(pod, completion_id, form)
    # Remembered first: between the two, who asks is told of the answer that is still there.
    await answered(partial(pod.stored.delete, completion_id, asker))
    await answered(partial(pod.streams.delete, job_ids(completion_id, form.jobs)))


async def end(pod: Pod, completion_id: str, form: Form) -> bool:
    """Seals what still runs of a completion that was found; false if it had ended.

    Raises:
        ApiError: Redis can't be asked (503).
    """
    terminal = Terminal(pod.id, error=CANCELLED)
    jobs = job_ids(completion_id, form.jobs)
    outcomes = [await answered(partial(pod.queue.cancel, job_id, terminal)) for job_id in jobs]
    return SealOutcome.WRITTEN in outcomes
