"""Requests into jobs."""

from collections.abc import Sequence

from llmboost.jobs import GenerationJob, JobClass, Prompt, SamplingParams, now
from llmboost.registry import ModelCard
from llmboost.settings import ApiSettings


def make_jobs(
    completion_id: str,
    card: ModelCard,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    settings: ApiSettings,
    *,
    owner: str,
    echo: bool = False,
    job_class: JobClass = "interactive",
) -> list[GenerationJob]:
    """One job per prompt."""
    created = now()
    return [
        GenerationJob(
            id=job_id,
            model=card.root,
            prompt=prompt,
            sampling=sampling,
            echo=echo,
            job_class=job_class,
            owner=owner,
            created=created,
            deadline=created + settings.request_timeout,
        )
        for job_id, prompt in zip(job_ids(completion_id, len(prompts)), prompts, strict=True)
    ]


def job_ids(completion_id: str, count: int) -> list[str]:
    """Ids of a completion's jobs: the first has its own, the others number it."""
    return [completion_id, *(f"{completion_id}-{number}" for number in range(1, count))]
