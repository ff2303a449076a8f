"""A request against the model that is to answer it: its prompt as token ids, and whether there is room."""

import asyncio
from typing import Any

from llmboost.entries import StreamError
from llmboost.jobs import GenerationJob
from llmboost_worker.engine.interface import Engine, EngineInfo, GrammarError
from llmboost_worker.text import PromptError, PromptTooLong, Tokenizer, encode_prompt

LONG_TEXT = 20_000
"""Characters beyond which a prompt is encoded in a thread, so that other streams don't wait for it."""


COMPILE_WITHIN_S = 10.0
"""How long a request waits for its grammar, in line behind others included."""


class Refused(Exception):
    """The request can't be served; `error` says why."""

    def __init__(self, error: StreamError) -> None:
        super().__init__(error.message)
        self.error = error


async def encoded(job: GenerationJob, tokenizer: Tokenizer, info: EngineInfo) -> list[int]:
    """The prompt's token ids.

    Raises:
        Refused: it can't be rendered, or is longer than the context.
    """
    prompt = job.prompt
    size = len(prompt.text or "") + sum(len(str(message)) for message in prompt.messages or ())
    arguments = (tokenizer, prompt, info.vocab_size, job.created, info.max_model_len)
    try:
        if size > LONG_TEXT:
            return await asyncio.to_thread(encode_prompt, *arguments)
        return encode_prompt(*arguments)
    except PromptTooLong as error:
        raise _too_long(job, info, f"more than {error.at_least}") from error
    except PromptError as error:
        raise Refused(
            StreamError(error.message, "invalid_request_error", error.code, error.param, status=400)
        ) from error


async def compiled(job: GenerationJob, engine: Engine) -> Any:
    """What the engine makes of the request's grammar; None if it has none.

    Raises:
        Refused: there is no output of that form, or the engine can't hold one to it.
    """
    grammar = job.sampling.grammar
    if grammar is None:
        return None
    # Not awaited itself: whoever stops waiting would cancel it for others too.
    waited = asyncio.wrap_future(engine.compile(grammar))
    try:
        async with asyncio.timeout(COMPILE_WITHIN_S):
            return await asyncio.shield(waited)
    except GrammarError as error:
        why = str(error)
    except TimeoutError:
        why = f"could not be compiled in {COMPILE_WITHIN_S:.0f} seconds: make it simpler."
    raise Refused(
        StreamError(
            f"'{grammar.param}' {why}",
            "invalid_request_error",
            "invalid_grammar",
            grammar.param or None,
            status=400,
        )
    )


def check_bias(job: GenerationJob, info: EngineInfo) -> None:
    """Raises:
    Refused: `logit_bias` names a token that the model does not have.
    """
    unknown = [token for token in job.sampling.logit_bias if not 0 <= token < info.vocab_size]
    if unknown:
        raise Refused(
            StreamError(
                f"logit_bias names token {unknown[0]}, but this model's token ids are whole numbers from "
                f"0 to {info.vocab_size - 1}. Was it made for another model's tokenizer?",
                "invalid_request_error",
                "invalid_token_id",
                "logit_bias",
                status=400,
            )
        )


def most_tokens(job: GenerationJob, prompt_tokens: int, info: EngineInfo) -> int:
    """Output tokens that the request may have; all that fit if it doesn't say.

    Raises:
        Refused: prompt and output are longer than the context.
    """
    longest = info.max_model_len
    asked = job.sampling.max_tokens
    if asked is not None and prompt_tokens + asked <= longest:
        return asked
    if asked is None and prompt_tokens < longest:
        return longest - prompt_tokens
    wanted = "" if asked is None else f" and {asked} for the completion, {prompt_tokens + asked} in all"
    remedy = "" if prompt_tokens >= longest else f" or ask for at most {longest - prompt_tokens} tokens"
    raise _too_long(job, info, str(prompt_tokens), wanted, remedy)


def _too_long(job: GenerationJob, info: EngineInfo, has: str, wanted: str = "", remedy: str = "") -> Refused:
    param = "messages" if job.prompt.messages is not None else "prompt"
    return Refused(
        StreamError(
            f"This model's maximum context length is {info.max_model_len} tokens, but the request "
            f"has {has} tokens in the {param}{wanted}. Shorten the {param}{remedy}.",
            "invalid_request_error",
            "context_length_exceeded",
            param,
            status=400,
        )
    )
