"""Outputs of a given form: grammars compiled for a model's tokens, and which of them may come next.

The library is llguidance. Its lexer and parser are built while they are used: a schema takes a millisecond
before the first token, where xgrammar 0.2.8 took 2 to 19, and then a mask over 49k or 152k tokens some 20
microseconds, against 25 to 50. It refuses by name what it can't enforce, where xgrammar passes over `not`,
`uniqueItems`, `if`, unknown formats and most of `allOf`; it bounds what a hostile pattern may cost; and it
brings no dependency, where xgrammar brings Triton (270 MB).
"""

from llmboost_worker.engine.grammar.compiler import Compiled, Grammars
from llmboost_worker.engine.grammar.matcher import Matcher, MatcherThread
from llmboost_worker.engine.grammar.vocabulary import Vocabulary

__all__ = ["Compiled", "Grammars", "Matcher", "MatcherThread", "Vocabulary"]
