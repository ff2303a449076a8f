"""Requests into jobs."""

from collections.abc import Sequence

from llmboost.jobs import GenerationJob, Prompt, SamplingParams, now
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
) -> list[GenerationJob]:
    """One job per prompt. The first has the completion's id, the others number it."""
    created = now()
    return [
        GenerationJob(
            id=completion_id if number == 0 else f"{completion_id}-{number}",
            model=card.root,
            prompt=prompt,
            sampling=sampling,
            echo=echo,
            owner=owner,
            created=created,
            deadline=created + settings.request_timeout,
        )
        for number, prompt in enumerate(prompts)
    ]
