"""The SDK: `LLMBoost` answers prompts from Python, on processes that it starts or on a running system.

inputs    what may be asked: prompts, chats, sampling parameters -> `Request`s
session   requests on one event loop: queue, tailer, one task each
outputs   answers on their way to the caller, who may be a thread or a coroutine
client    `LLMBoost`: all of it behind blocking calls
"""

from llmboost.sdk.client import LLMBoost
from llmboost.sdk.inputs import FormattedPrompt
from llmboost.sdk.outputs import LLMBoostError, Output

__all__ = ["FormattedPrompt", "LLMBoost", "LLMBoostError", "Output"]
