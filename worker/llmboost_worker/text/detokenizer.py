"""Token ids back into text, one at a time.

Why not `tokenizers.decoders.DecodeStream`, nor the prefix and read offsets of TGI and vLLM, which decode a
window twice and show the difference: both wait as long as the text ends in U+FFFD, so they hold back the
U+FFFD that a model means, hold back without bound while bytes are invalid, and raise (DecodeStream) or lose
text once a byte that is invalid follows a character that was shown. Here the two families that nearly every
language model belongs to are decoded byte by byte; the window is for the rest.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(ABC):
    """The text of one choice, as its ids come. Made by `Tokenizer.detokenizer`.

    All pushes and the flush, put together, are `decode` of all ids with special tokens skipped, except that
    a character that is still incomplete at the end is dropped. Only the ids matter: a second detokenizer
    that has read the same ids goes on in the same way.
    """

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The characters that have become whole with this token; often none."""

    def flush(self) -> str:
        """The sequence has ended: what was held back, without an incomplete character."""
        return ""


class ByteLevelDetokenizer(Detokenizer):
    """A text is the UTF-8 reading of all its tokens' bytes, each maximal invalid part read as one U+FFFD
    (as in the Unicode standard, section 3.9; Rust's `from_utf8_lossy` and Python's codec agree)."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        """`piece`: the bytes of a token, b"" for one that is skipped."""
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._piece(token_id))


class ByteFallbackDetokenizer(Detokenizer):
    """A text is its tokens' texts; neighbouring byte tokens make a run, which is read as UTF-8.

    `decode` reads a run that isn't valid UTF-8 as one U+FFFD a byte, its whole characters too. Here they have
    been shown by then, and stay; the bytes from the invalid character to the end of the run are one U+FFFD
    each. To be the same even there, every run would have to wait for its end: whole sentences in scripts
    that have no tokens of their own, and every newline of Llama 2, which is the token <0x0A>.
    """

    def __init__(self, piece: Callable[[int], str | bytes], strip: str = "", strip_count: int = 0) -> None:
        """`piece`: the text or byte of a token, "" for one that is skipped. Up to `strip_count` times the
        character `strip` is dropped at the beginning of the text."""
        self._piece = piece
        self._strip = strip
        self._to_strip = strip_count
        self._incomplete = b""
        self._run_is_invalid = False

    def push(self, token_id: int) -> str:
        piece = self._piece(token_id)
        if not piece:
            return ""
        text = self._end_run() + piece if isinstance(piece, str) else self._go_on_with_run(piece)
        if self._to_strip and text:
            return self._stripped(text)
        return text

    def _go_on_with_run(self, byte: bytes) -> str:
        if self._run_is_invalid:
            return _REPLACEMENT
        self._incomplete += byte
        try:
            text, length = codecs.utf_8_decode(self._incomplete, "strict", False)
        except UnicodeDecodeError:
            self._run_is_invalid = True
            return _REPLACEMENT * self._take_incomplete()
        self._incomplete = self._incomplete[length:]
        return text

    def _end_run(self) -> str:
        self._run_is_invalid = False
        return _REPLACEMENT * self._take_incomplete()

    def _take_incomplete(self) -> int:
        count, self._incomplete = len(self._incomplete), b""
        return count

    def _stripped(self, text: str) -> str:
        while self._to_strip and text.startswith(self._strip):
            text = text[len(self._strip) :]
            self._to_strip -= 1
        if text:
            self._to_strip = 0
        return text


class WindowDetokenizer(Detokenizer):
    """For any other tokenizer: what `decode` adds to the last text shown, with the tokens of that text
    before it.

    Exact where a token's text depends on no more than the token before it. A text that ends in U+FFFD is
    taken for incomplete and held back, for `MAX_HELD` tokens at most, unless the last token has that
    character in its name: one that the model means in three bytes can't be told from an incomplete one, and
    is lost at the very end.
    """

    MAX_HELD = 8
    """A character has four bytes, and a token at least one of them; twice that."""

    def __init__(self, decode: Callable[[list[int]], str], name: Callable[[int], str]) -> None:
        """`decode`: ids to text. `name`: the token's entry in the vocabulary, "" for one that is skipped."""
        self._decode = decode
        self._name = name
        self._window: list[int] = []
        self._shown = 0
        """How many ids of the window have been shown."""

    def push(self, token_id: int) -> str:
        name = self._name(token_id)
        if not name:
            return ""
        self._window.append(token_id)
        text = self._not_shown()
        incomplete = text.endswith(_REPLACEMENT) and _REPLACEMENT not in name
        if (not text or incomplete) and len(self._window) - self._shown < self.MAX_HELD:
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text

    def flush(self) -> str:
        text = self._not_shown()
        self._window, self._shown = [], 0
        return text.rstrip(_REPLACEMENT)

    def _not_shown(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._shown])) :]


def continued(detokenizer: Detokenizer, ids: Sequence[int]) -> Detokenizer:
    """The detokenizer after these ids, whose text isn't wanted."""
    for token_id in ids:
        detokenizer.push(token_id)
    return detokenizer
