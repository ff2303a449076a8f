"""Grammars for small tokenizers, and a model without a mind: it draws any token that is allowed."""

import json
import random
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmboost.jobs import Grammar
from llmboost_worker.engine.grammar import Compiled, Grammars, Matcher
from llmboost_worker.text import Tokenizer
from tests.unit.text_tokenizers import ALL, token_id

Schema = dict[str, Any]

PADDING = 37
"""Ids that the model has and the tokenizer doesn't."""
END = {"byte_level": "<|end|>", "byte_fallback": "</s>", "byte_fallback_unstripped": "</s>"}


@cache
def tokenizer_of(family: str) -> Tokenizer:
    return ALL[family]()


_made: dict[str, Grammars] = {}


def grammars_of(family: str) -> Grammars:
    """The same ones until the module of tests has ended."""
    if family not in _made:
        tokenizer = tokenizer_of(family)
        ends = [token_id(tokenizer, END[family])] if family in END else [0]
        _made[family] = Grammars(tokenizer.token_bytes, tokenizer.vocab_size + PADDING, ends)
    return _made[family]


def close_grammars() -> None:
    """Ends the threads of all that `grammars_of` has made."""
    while _made:
        _made.popitem()[1].close()


def of_schema(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema), "response_format")


def of_choices(*choices: str) -> Grammar:
    return Grammar("choice", json.dumps(choices), "guided_choice")


def compiled(grammar: Grammar, family: str = "byte_level") -> Compiled:
    return grammars_of(family).compile(grammar).result()


def allowed(matcher: Matcher) -> NDArray[np.int64]:
    """Ids that may come next."""
    return np.flatnonzero(np.unpackbits(matcher.mask.view(np.uint8), bitorder="little"))


def drawn(grammar: Grammar, seed: int, family: str = "byte_level", most: int = 2000) -> list[int] | None:
    """An output to its end, by tokens drawn at random; None if that doesn't come soon."""
    one = compiled(grammar, family)
    matcher = one.matcher(start=0, holds_end=False)
    chance, ids = random.Random(seed), list[int]()
    while len(ids) < most:
        matcher.read(ids)
        assert matcher.error is None, matcher.error
        ids.append(int(chance.choice(allowed(matcher))))
        if ids[-1] in one.vocabulary.end_ids:
            return ids
    return None


def said(ids: list[int], family: str = "byte_level") -> str:
    """What a reader sees of them."""
    detokenizer = tokenizer_of(family).detokenizer(exact=True)
    return "".join([detokenizer.push(token) for token in ids]) + detokenizer.flush()
