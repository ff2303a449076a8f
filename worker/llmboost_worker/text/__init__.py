"""Between text and token ids: templates and tokenizing on the way in, detokenizing and stop strings on
the way out.

What comes out is a function of the token ids alone. A killed worker's stream is resumed by replaying the
ids that it had emitted, so the text that follows must be what the unbroken sequence would have shown.
"""

from llmboost_worker.text.choice import ChoiceText, TextDelta
from llmboost_worker.text.detokenizer import Detokenizer
from llmboost_worker.text.errors import PromptError, PromptTooLong, TextError, TokenizerError
from llmboost_worker.text.prompt import encode_prompt, render_prompt
from llmboost_worker.text.stops import StopStrings
from llmboost_worker.text.tokenizer import Tokenizer

__all__ = [
    "ChoiceText",
    "Detokenizer",
    "PromptError",
    "PromptTooLong",
    "StopStrings",
    "TextDelta",
    "TextError",
    "Tokenizer",
    "TokenizerError",
    "encode_prompt",
    "render_prompt",
]
