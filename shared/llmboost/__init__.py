"""llmboost: language models behind a message queue, with token streams that survive what makes them.

from llmboost import LLMBoost
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmboost.sdk import FormattedPrompt, LLMBoost, LLMBoostError

__all__ = ["FormattedPrompt", "LLMBoost", "LLMBoostError"]


def __getattr__(name: str) -> Any:
    """The SDK, when it is first asked for: every process imports `llmboost`, and few use the SDK."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmboost import sdk

    return getattr(sdk, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
