"""From what a client sends to a grammar for a model's tokens: bounded in time and memory, and kept."""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from llmboost.jobs import Grammar, GrammarKind
from llmboost_worker.engine.grammar.matcher import Matcher
from llmboost_worker.engine.grammar.schema import check_schema
from llmboost_worker.engine.grammar.vocabulary import Vocabulary
from llmboost_worker.engine.interface import GrammarError

KEPT = 64
"""Compiled grammars, the last ones used. Most take a few kilobytes, and none more than some 80 MB."""
THREADS = 2
"""That compile: one slow grammar doesn't hold up all others."""
STACK = 256 << 20
"""Bytes of address space for each of them. The library follows references and rules by recursion: in 8 MB,
as is usual, a chain of 1,000 references ended the process."""

LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""A fifth to a third of the library's own. With these the worst of some fifty hostile patterns and grammars
(such as `((a{1000}){1000}){1000}`) took 0.3 s and 50 MB for its first mask, and 0.1 s for a later one; an
enumeration of 10,000 values and an object of 1,000 properties fit."""

OPTIONS = '%llguidance {"no_forcing": true}\n'
"""The model decides how a text that must come is cut into tokens. Otherwise the library would ask a tokenizer
in the middle of a text, where many answer as if it were the beginning."""

JSON_OPTIONS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": None,
    "coerce_one_of": False,
    "lenient": False,
}
"""All of the library's, so that a schema can't set any."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar for one model's tokens, from which any number of outputs start."""

    template: LLMatcher
    vocabulary: Vocabulary
    is_json: bool

    def matcher(self, start: int, holds_end: bool) -> Matcher:
        """For a new output; see `Matcher`."""
        return Matcher(
            self.template.deep_copy(), self.vocabulary, is_json=self.is_json, start=start, holds_end=holds_end
        )


class Grammars:
    """Compiles grammars in threads of its own and keeps them."""

    def __init__(
        self, tokens: Callable[[], Sequence[bytes]], vocab_size: int, end_ids: Iterable[int]
    ) -> None:
        """See `Vocabulary`. `tokens` is called for the first grammar, and raises if it can't say."""
        self._tokens = tokens
        self._vocab_size = vocab_size
        self._end_ids = tuple(end_ids)
        self._vocabulary: Vocabulary | None = None
        self._loading = threading.Lock()
        self._pool = _deep_pool()
        self._kept: OrderedDict[tuple[GrammarKind, str], Future[Compiled]] = OrderedDict()
        """Failures too."""
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> "Future[Compiled]":
        """The future fails with GrammarError if there is no such grammar. It is shared: never cancel it."""
        key = (grammar.kind, grammar.value)
        with self._lock:
            future = self._kept.pop(key, None)
            if future is None:
                future = self._pool.submit(self._compile, grammar)
            self._kept[key] = future
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return future

    def close(self) -> None:
        """Doesn't wait for what is being compiled."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> Compiled:
        vocabulary = self._load()
        try:
            template = LLMatcher(vocabulary.tokenizer, _source(grammar), log_level=0, limits=LIMITS)
            mask = np.zeros(vocabulary.num_words, dtype=np.int32)
            if not template.is_error():
                # Much of the work, and so many errors, only come with the first mask.
                template.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        except GrammarError:
            raise
        except BaseException as error:  # a panic of the library's is no Exception
            raise GrammarError(f"can't be used: {error}.") from error
        if template.is_error():
            raise GrammarError(_explained(template.get_error() or template.stop_reason()))
        return Compiled(template, vocabulary, grammar.kind in ("json", "json_schema"))

    def _load(self) -> Vocabulary:
        with self._loading:
            if self._vocabulary is None:
                if not self._end_ids:
                    raise GrammarError(
                        "can't be met: this model has no end-of-sequence token, so its answers have no end."
                    )
                try:
                    tokens = self._tokens()
                except Exception as error:
                    raise GrammarError(f"can't be met: {error}.") from error
                self._vocabulary = Vocabulary(tokens, self._vocab_size, self._end_ids)
            return self._vocabulary


def _deep_pool() -> ThreadPoolExecutor:
    """Its threads have room for `STACK`."""
    before = threading.stack_size(STACK)
    try:
        pool = ThreadPoolExecutor(THREADS, "llmboost-grammar")
        all_there = threading.Barrier(THREADS)
        for _ in range(THREADS):
            pool.submit(all_there.wait)  # each makes a thread, since the others are busy
    finally:
        threading.stack_size(before)
    return pool


def _source(grammar: Grammar) -> str:
    """In the library's words."""
    match grammar.kind:
        case "json":
            return _json({"type": "object"})
        case "json_schema":
            schema = json.loads(grammar.value)
            check_schema(schema)
            return _json(schema)
        case "regex":
            # \d and \w are ASCII, as in the patterns of a JSON schema.
            return _lark(f"start: /{regex_to_lark(grammar.value, 'dw')}/")
        case "choice":
            # One terminal: as rules they would be parsed side by side, of which the library allows 2,000.
            choices = " | ".join(json.dumps(choice) for choice in json.loads(grammar.value))
            return _lark(f"start: CHOICE\nCHOICE: {choices}")
        case "grammar":
            if directive := re.search(r"%(json|lark|llguidance|regex)\b", grammar.value):
                raise GrammarError(f"has {directive[0]}, which this server doesn't take: write it as rules.")
            try:
                return _lark(any_to_lark(grammar.value))
            except Exception as error:  # of its own parser, in many kinds
                raise GrammarError(f"is neither GBNF nor Lark: {error}.") from error


def _json(schema: dict[str, Any]) -> str:
    whole = {"name": "whole", "json_schema": {**schema, "x-guidance": JSON_OPTIONS}}
    return json.dumps({"grammars": [{"lark_grammar": f"{OPTIONS}start: @whole"}, whole]})


def _lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": OPTIONS + text}]})


def _explained(error: str) -> str:
    """The library's error, which may have several lines, as a sentence after the name of a field."""
    lines = error.splitlines()
    what = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    if what == "NoExtensionBias":
        return "can't be met: there is no text of that form."
    if what.startswith("panic") or "too big" in what or "too large" in what or "too many" in what:
        return "is too large or too complex: make it smaller."
    if what.startswith("Unimplemented keys: "):
        keys = what.removeprefix("Unimplemented keys: ")
        return f"has keywords that this server can't enforce: {keys}. Remove them, or say it in another way."
    if what.startswith("oneOf constraints are not supported"):
        return "has a 'oneOf' whose schemas may hold at once, which this server can't enforce: use 'anyOf'."
    if "lookarounds not supported" in what:
        return "has an assertion, such as \\b, that this server can't enforce: leave it out."
    if place := re.match(r"at (\d+)\(\d+\): ", what):
        line = int(place[1]) - OPTIONS.count("\n")
        what = f"{what[place.end() :]} (line {line})"
    return f"can't be used: {what.rstrip('.')}."
