"""The service tier that a request asks for, and what it means for its jobs."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, WithJsonSchema

from llmboost.jobs import JobClass
from llmboost_api.protocol.request import problem
from llmboost_api.protocol.translate import shown

Tier = Literal["auto", "default", "flex"]
_TIERS = get_args(Tier)


def _tier(value: Any) -> Any:
    if value in _TIERS:
        return value
    if value in ("priority", "fast", "scale"):
        raise problem(
            "unsupported_value",
            f"is '{value}', which this server does not have: use 'default', or 'flex' for what may wait.",
        )
    raise problem("invalid_value", f"must be 'auto', 'default' or 'flex', not {shown(value)}.")


ServiceTier = Annotated[
    Tier, BeforeValidator(_tier), WithJsonSchema({"type": "string", "enum": list(_TIERS)})
]


def job_class(tier: Tier | None) -> JobClass:
    """Flex takes the slots that are free, and gives them up when another request comes."""
    return "batch" if tier == "flex" else "interactive"


def used(tier: Tier | None) -> Tier | None:
    """What the answer says; nothing if nothing was asked."""
    return "default" if tier == "auto" else tier
