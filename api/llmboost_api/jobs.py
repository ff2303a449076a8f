"""Requests into jobs."""

from collections.abc import Sequence

from llmboost.jobs import GenerationJob, JobClass, Prompt, SamplingParams
from llmboost.registry import ModelCard


def make_jobs(
    completion_id: str,
    card: ModelCard,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    owner: str,
    created: float,
    deadline: float,
    echo: bool = False,
    job_class: JobClass = "interactive",
    needs_audience: bool = True,
) -> list[GenerationJob]:
    """One job per prompt."""
    return [
        GenerationJob(
            id=job_id,
            model=card.root,
            prompt=prompt,
            sampling=sampling,
            echo=echo,
            owner=owner,
            created=created,
            deadline=deadline,
            job_class=job_class,
            needs_audience=needs_audience,
        )
        for job_id, prompt in zip(job_ids(completion_id, len(prompts)), prompts, strict=True)
    ]


def job_ids(completion_id: str, count: int) -> list[str]:
    """Ids of a completion's jobs: the first has its own, the others number it."""
    return [completion_id, *(f"{completion_id}-{number}" for number in range(1, count))]
