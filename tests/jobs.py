"""Jobs as tests want them."""

from typing import Any

from llmboost.jobs import GenerationJob, Prompt, SamplingParams, new_id, now

MODEL = "test-model"


def make_job(text: str = "hello", *, lasts: float = 60.0, **fields: Any) -> GenerationJob:
    """A job with a fresh id; `lasts` is the time until its deadline, in seconds."""
    created = now()
    sampling = {name: fields.pop(name) for name in list(fields) if name in SamplingParams.__struct_fields__}
    defaults: dict[str, Any] = {
        "id": new_id("test"),
        "model": MODEL,
        "prompt": Prompt(text=text),
        "sampling": SamplingParams(**sampling),
        "created": created,
        "deadline": created + lasts,
    }
    return GenerationJob(**{**defaults, **fields})
