"""A model's tokens as bytes, the way the grammar library wants them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from llguidance import LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

BLANKS = b" \t\n\r"
"""JSON's whitespace."""


class Vocabulary:
    """What each of a model's tokens adds to a text, and which ones end it.

    Making one takes up to a second for a large vocabulary. Nothing in it changes afterwards.
    """

    def __init__(self, tokens: Sequence[bytes], size: int, end_ids: Iterable[int]) -> None:
        """
        Args:
            tokens: By id; b"" for what isn't text (special tokens), which no grammar allows.
            size: The model's own number of ids. It may be larger than the tokenizer's (padded): what has no
                token is never allowed. Tokens beyond it can't be drawn.
            end_ids: Allowed where an output may end, and nowhere else.
        """
        self.size = size
        self.tokens = [*tokens[:size], *[b""] * (size - len(tokens))]
        self.end_ids = sorted(set(end_ids))
        self.ends = self.packed(self.end_ids)
        self.blank_first = self.packed(
            token for token, text in enumerate(self.tokens) if text and text[0] in BLANKS
        )
        """Tokens that begin with whitespace."""
        self.tokenizer = LLTokenizer(
            TokenizerWrapper(_Source(self.tokens, self.end_ids)), n_vocab=size, eos_token=self.end_ids
        )

    @property
    def num_words(self) -> int:
        """Length of a packed set of tokens, an int32 for 32 of them, lowest bit first."""
        return (self.size + 31) // 32

    def packed(self, ids: Iterable[int]) -> NDArray[np.int32]:
        """[num_words]"""
        bits = np.zeros(self.num_words * 32, dtype=np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


class _Source:
    """The attributes that `TokenizerWrapper` reads."""

    bos_token_id: int | None = None

    def __init__(self, tokens: list[bytes], end_ids: list[int]) -> None:
        self.tokens = list(tokens)
        for end in end_ids:  # by name, since the library leaves out what is empty
            self.tokens[end] = b"<end of sequence %d>" % end
        self.special_token_ids = end_ids
        self.eos_token_id = end_ids[0]

    def __call__(self, text: Any) -> list[int]:
        """Tokenizes; not asked for, since no tokens are forced."""
        return []
