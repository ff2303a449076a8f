"""What to continue, as token ids."""

import time

from llmboost.jobs import Prompt
from llmboost_worker.text.errors import PromptError, PromptTooLong
from llmboost_worker.text.template import render_chat
from llmboost_worker.text.tokenizer import Tokenizer

LOOKED_AT = 16
"""Characters per token of the context that are encoded to see whether a prompt is far too long. A prompt of
7 MB took a worker 5 s and 1.2 GB, only to be refused."""


def render_prompt(tokenizer: Tokenizer, prompt: Prompt, now: float | None = None) -> str:
    """The prompt as text: messages through the model's template, token ids decoded.

    Args:
        tokenizer: The model's.
        prompt: What to continue.
        now: Unix time that a template may write as today's date (None: the clock). Give the job's creation,
            so that each attempt gets the same prompt.

    Raises:
        PromptError: it can't be rendered.
    """
    if prompt.messages is not None:
        return render_chat(tokenizer.hf, prompt.messages, time.time() if now is None else now)
    if prompt.text is not None:
        return prompt.text
    return tokenizer.decode(_checked(_given_ids(prompt), tokenizer.vocab_size, "prompt"))


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: Prompt,
    vocab_size: int | None = None,
    now: float | None = None,
    context: int | None = None,
) -> list[int]:
    """The prompt's ids; at least one, each in [0, vocab_size).

    May run in any thread: see `Tokenizer`.

    Args:
        tokenizer: The model's.
        prompt: What to continue.
        vocab_size: The model's, which may differ from the tokenizer's (None: the tokenizer's).
        now: See `render_prompt`.
        context: The model's longest sequence, in tokens (None: any). Prompts that are a little longer are
            encoded all the same, for an exact count.

    Raises:
        PromptTooLong: it has many more tokens than `context`.
        PromptError: it has no ids, or can't be rendered or encoded.
    """
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    if prompt.messages is None and prompt.text is None:
        return _checked(_given_ids(prompt), size, "prompt")
    param = "prompt" if prompt.messages is None else "messages"
    text = render_prompt(tokenizer, prompt, now)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"The text has half of a surrogate pair, {text[error.start]!a}, at character {error.start}; that "
            "alone is no character. It may have been cut inside an emoji; send whole characters.",
            param=param,
            code="invalid_text",
        ) from error
    if context is not None:
        _refuse_if_far_beyond(tokenizer, text, context, param)
    # A template writes the special tokens itself.
    add_special_tokens = prompt.add_special_tokens and prompt.messages is None
    return _checked(tokenizer.encode(text, add_special_tokens), size, param)


def _refuse_if_far_beyond(tokenizer: Tokenizer, text: str, context: int, param: str) -> None:
    """Looks at the text's beginning. Twice the context there leaves room for what a cut in the middle of a
    word may add."""
    looked_at = context * LOOKED_AT
    if len(text) > 2 * looked_at:
        at_least = len(tokenizer.encode(text[:looked_at], False))
        if at_least > 2 * context:
            raise PromptTooLong(at_least, param)


def _given_ids(prompt: Prompt) -> list[int]:
    if prompt.token_ids is None:
        raise PromptError(
            "There is no prompt: send a chat's messages, a text, or token ids.", "prompt", "empty_prompt"
        )
    return prompt.token_ids


def _checked(ids: list[int], vocab_size: int, param: str) -> list[int]:
    if not ids:
        raise PromptError("The prompt is empty: it must have at least one token.", param, "empty_prompt")
    for position, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise PromptError(
                f"Token {position} of the prompt is {token_id!r}; this model's token ids are whole numbers "
                f"from 0 to {vocab_size - 1}. Did another model's tokenizer make them?",
                param=param,
                code="invalid_token_id",
            )
    return ids
