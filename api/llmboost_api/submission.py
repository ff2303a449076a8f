"""The way into the queue: a request that was understood becomes the jobs of a completion, submitted once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from llmboost.audience import NOBODY_READS
from llmboost.entries import GAP, NO_FOLLOW_UP, REQUEST_LOST, FollowUp, Terminal
from llmboost.jobs import GenerationJob, JobClass, Prompt, made_at, now
from llmboost.queue import SubmittedBefore
from llmboost.registry import ModelCard
from llmboost.streams import BEGINNING
from llmboost_api.errors import unavailable
from llmboost_api.generation import NOT_ACCEPTED
from llmboost_api.idempotency import RequestName, deleted
from llmboost_api.jobs import job_ids, make_jobs
from llmboost_api.patience import answered
from llmboost_api.pod import Pod
from llmboost_api.protocol import tier
from llmboost_api.protocol.form import Endpoint, Form, decode_form
from llmboost_api.protocol.sampling import GenerationRequest
from llmboost_api.stored import StoredAnswer

_NO_ANSWER = {error.code for error in (NOBODY_READS, REQUEST_LOST, GAP, NOT_ACCEPTED)}
"""In which requests end that nobody waited for, or that were lost. Who sends one again is to be answered."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A completion on its way into the queue."""

    id: str
    jobs: Sequence[GenerationJob]
    form: Form
    follow_up: FollowUp = NO_FOLLOW_UP
    stored: StoredAnswer | None = None
    listed: bool = False
    """A stored answer that its owner's list shows."""


def make_submission(
    pod: Pod,
    endpoint: Endpoint,
    completion_id: str,
    card: ModelCard,
    asked: GenerationRequest,
    prompts: Sequence[Prompt],
    *,
    owner: str,
    job_class: JobClass | None = None,
    needs_audience: bool = True,
    deadline: float | None = None,
    follow_up: FollowUp = NO_FOLLOW_UP,
    stored: StoredAnswer | None = None,
    listed: bool = False,
) -> Submission:
    """A request's jobs, and how their answer is written down.

    `job_class`: default: of the request's service tier. `deadline`: Unix time (s); default: after the pod's
    time limit for requests.
    """
    created = now()
    jobs = make_jobs(
        completion_id,
        card,
        prompts,
        asked.sampling_params(completion_id),
        owner=owner,
        created=created,
        deadline=created + pod.settings.request_timeout if deadline is None else deadline,
        echo=asked.echoes,
        job_class=tier.job_class(asked.service_tier) if job_class is None else job_class,
        needs_audience=needs_audience,
    )
    form = Form.of(asked, endpoint, jobs, always_usage=pod.settings.always_include_usage)
    return Submission(completion_id, jobs, form, follow_up, stored, listed)


async def submit(
    pod: Pod, make: Callable[[str], Submission], completion_id: str, name: RequestName | None = None
) -> tuple[str, Form]:
    """Submits what `make` makes under this id, unless a request of the same name was accepted before and
    answered, or still is; returns the id and the form of the completion to follow.

    Raises:
        ApiError: the queue is full (429) or can't be reached (503), the name is another request's (409), or
            the answer was deleted (410).
    """
    submission = make(completion_id)
    await _store(pod, submission, completion_id)
    earlier = None
    accepted = False
    try:
        earlier = await _enqueue(pod, submission, name)
        accepted = earlier is None
    finally:
        if submission.stored is not None and not accepted:
            await answered(partial(pod.stored.discard, completion_id, submission.stored.owner))
    if earlier is None:
        return completion_id, submission.form
    return await _join(pod, make(earlier))


async def made_before(pod: Pod, name: RequestName | None, *, stored: bool) -> tuple[str, Form] | None:
    """The completion that a request of the same name has made, if it has all that it needs: what the request
    refers to may be gone by now. None: see what `submit` says.

    `stored`: it is to be.

    Raises:
        ApiError: the name is another request's (409), or Redis can't be asked (503).
    """
    if name is None:
        return None
    taken = await answered(partial(pod.queue.taken_by, name.once("")))
    if taken is None:
        return None
    completion_id = name.completion_of(taken)
    form = await _form(pod, completion_id)
    if form is None or form.jobs > 1 or await _unanswered(pod, completion_id, form):
        return None
    if stored and await answered(partial(pod.stored.get, completion_id)) is None:
        return None
    return completion_id, form


async def _store(pod: Pod, submission: Submission, completion_id: str) -> None:
    stored, job = submission.stored, submission.jobs[0]
    if stored is not None:
        lasts = job.deadline - job.created
        await answered(lambda: pod.stored.put(completion_id, stored, lasts, listed=submission.listed))


async def _enqueue(pod: Pod, submission: Submission, name: RequestName | None) -> str | None:
    """Takes the name and enqueues the jobs; or returns the id of the completion that the name stands for."""
    once = None if name is None else name.once(submission.id)
    while True:
        try:
            await pod.generations.submit(submission.jobs, submission.form, submission.follow_up, once)
        except SubmittedBefore as before:
            assert name is not None
            earlier = name.completion_of(before.value)
            form = await _form(pod, earlier)
            if form is None or not await _unanswered(pod, earlier, form):
                return earlier
            await answered(partial(pod.queue.forget, name.once(earlier)))
        else:
            return None


async def _form(pod: Pod, completion_id: str) -> Form | None:
    """How a completion is written down; None if it is gone."""
    queued, _ = await answered(partial(pod.streams.find, completion_id, BEGINNING))
    return None if queued is None else decode_form(queued.form)


async def _unanswered(pod: Pod, completion_id: str, form: Form) -> bool:
    """Whether it has ended, for no fault of its own, in what is no answer to whoever comes again."""
    logs = await answered(partial(pod.streams.read_each, job_ids(completion_id, form.jobs)))
    ends = [log[-1][1] if log else None for log in logs]
    if not isinstance(ends[0], Terminal):  # the name goes with this job
        return False
    errors = [end.error for end in ends if isinstance(end, Terminal) and end.error is not None]
    return any(error.code in _NO_ANSWER for error in errors)


async def _join(pod: Pod, submission: Submission) -> tuple[str, Form]:
    """The completion that another try of this request has made."""
    completion_id = submission.id
    form = await _form(pod, completion_id)
    if form is None:
        if await answered(partial(pod.stored.was_deleted, completion_id)):
            raise deleted()
        raise unavailable("The answer to this request expired a moment ago. Try again.")
    # That one may have died before it had done all of this, or not have heard that it was accepted.
    await _store(pod, submission, completion_id)
    if form.jobs > 1 and now() - (made_at(completion_id) or 0.0) < pod.settings.retention:
        # None of its streams can have expired yet.
        await pod.generations.submit(submission.jobs[1:], form, submission.follow_up, again=True)
    return completion_id, form
