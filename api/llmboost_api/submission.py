"""The way into the queue: a request that was understood becomes the jobs of a completion, submitted once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from llmboost.entries import NO_FOLLOW_UP, FollowUp
from llmboost.jobs import GenerationJob, JobClass, Prompt, made_at, now
from llmboost.queue import SubmittedBefore
from llmboost.registry import ModelCard
from llmboost.streams import BEGINNING
from llmboost_api.errors import unavailable
from llmboost_api.idempotency import RequestName
from llmboost_api.jobs import make_jobs
from llmboost_api.patience import answered
from llmboost_api.pod import Pod
from llmboost_api.protocol import tier
from llmboost_api.protocol.form import Endpoint, Form, decode_form
from llmboost_api.protocol.sampling import GenerationRequest
from llmboost_api.stored import StoredAnswer


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
    """Submits what `make` makes under this id, unless a request of the same name was accepted before; returns
    the id and the form of the completion to follow.

    Raises:
        ApiError: the queue is full (429) or can't be reached (503), or the name is another request's (409).
    """
    submission = make(completion_id)
    stored, jobs = submission.stored, submission.jobs
    if stored is not None:
        lasts = jobs[0].deadline - jobs[0].created
        await answered(lambda: pod.stored.put(completion_id, stored, lasts, listed=submission.listed))
    once = None if name is None else name.once(completion_id)
    accepted = False
    try:
        await pod.generations.submit(jobs, submission.form, submission.follow_up, once)
        accepted = True
    except SubmittedBefore as before:
        assert name is not None
        return await _join(pod, make, name.completion_of(before.value))
    finally:
        if stored is not None and not accepted:
            await answered(lambda: pod.stored.discard(completion_id, stored.owner))
    return completion_id, submission.form


async def made_before(pod: Pod, name: RequestName | None) -> tuple[str, Form] | None:
    """The completion, of one job, that a request of the same name has made, and its form; or None.

    For requests that need more than themselves: it may be gone when they are sent again.

    Raises:
        ApiError: the name is another request's (409), or Redis can't be asked (503).
    """
    taken = None if name is None else await answered(partial(pod.queue.submitted_before, name.once("")))
    if name is None or taken is None:
        return None
    completion_id = name.completion_of(taken)
    queued, _ = await answered(partial(pod.streams.find, completion_id, BEGINNING))
    return None if queued is None else (completion_id, decode_form(queued.form))


async def _join(pod: Pod, make: Callable[[str], Submission], completion_id: str) -> tuple[str, Form]:
    """The completion that a request of the same name has made."""
    queued, _ = await answered(lambda: pod.streams.find(completion_id, BEGINNING))
    if queued is None:
        raise unavailable("The answer to this request expired a moment ago. Try again.")
    form = decode_form(queued.form)
    if form.jobs > 1 and now() - (made_at(completion_id) or 0.0) < pod.settings.retention:
        # Whoever submitted the first of them may have died before the last. None can have expired yet.
        submission = make(completion_id)
        await pod.generations.submit(submission.jobs[1:], form, submission.follow_up)
    return completion_id, form
