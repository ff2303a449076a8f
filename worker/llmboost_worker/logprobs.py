"""Logprobs as the log has them: with the tokens' texts."""

from collections.abc import Sequence

from llmboost.entries import TokenLogprob
from llmboost_worker.engine.interface import TokenLogprobs
from llmboost_worker.text import Tokenizer
from llmboost_worker.text.detokenizer import Detokenizer


def of_tokens(
    tokenizer: Tokenizer,
    detokenizer: Detokenizer,
    token_ids: Sequence[int],
    scores: Sequence[TokenLogprobs | None],
) -> list[TokenLogprob]:
    """Of the next tokens of a text. A special one is no part of it, and others may be part of a character.

    Args:
        tokenizer: The model's.
        detokenizer: Of that text; is moved on.
        token_ids: The tokens.
        scores: One for each, and perhaps more; None for a prompt's first token.
    """
    result = []
    for token_id, score in zip(token_ids, scores, strict=False):
        text, raw = tokenizer.token_string(token_id)
        top = () if score is None else tuple(_rival(tokenizer, *likely) for likely in score.top)
        logprob = None if score is None else score.logprob
        result.append(TokenLogprob(text, logprob, raw, top, len(detokenizer.push(token_id))))
    return result


def _rival(tokenizer: Tokenizer, token_id: int, logprob: float) -> TokenLogprob:
    text, raw = tokenizer.token_string(token_id)
    return TokenLogprob(text, logprob, raw)
