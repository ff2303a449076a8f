"""The model's tokenizer: text into ids, ids into text."""

import random
import threading
from collections.abc import Sequence
from typing import Any

from llmboost_worker.text.detokenizer import (
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    continued,
)
from llmboost_worker.text.errors import TokenizerError
from llmboost_worker.text.pieces import ByteFallback, ByteLevel, recognise

CONTEXT_TOKENS = 8
"""How many tokens before the output decide how it begins: a character has at most four bytes."""

_SAMPLE = "Hello, world!  It's 3 o'clock.\n\n\tdef f(x): return {x}  # naïve 你好 😀"


class Tokenizer:
    """One model's tokenizer, shared by all requests.

    Every method may be called from several threads at once, so a long prompt may be encoded in an executor. A
    fast tokenizer (nearly all are) does that in Rust without the GIL; a slow one, in Python, encodes and
    decodes one text at a time. A `Detokenizer` belongs to one thread.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Wraps a tokenizer of transformers, which nobody else may use from now on: to change its truncation
        or padding while another thread encodes is an error."""
        self.hf = tokenizer
        self._fast = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._lock = threading.Lock()
        self._encode("", False)  # sets truncation and padding once, before there are threads
        self.vocab_size: int = max(tokenizer.get_vocab().values(), default=-1) + 1
        """Ids the tokenizer knows are below this. The model's own number may be larger (padded) or
        smaller."""
        self._special = self._special_ids()
        self._strings: dict[int, tuple[str, list[int] | None]] = {}
        self._pieces: dict[int, Any] = {}
        self._family = recognise(self._fast) if self._fast else None
        if self._family and not self._family_decodes_alike():
            self._family = None

    @classmethod
    def load(cls, model: str, revision: str | None = None, trust_remote_code: bool = False) -> "Tokenizer":
        """Loads the tokenizer of a folder or of a model on the Hugging Face hub.

        Raises:
            TokenizerError: it isn't there or can't be read.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                model, revision=revision, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # OSError, ValueError, KeyError, and whatever a model's own code raises
            is_said = isinstance(error, (OSError, ValueError))
            why = str(error) if is_said else f"{type(error).__name__}: {error}."
            raise TokenizerError(
                f"The tokenizer of {model!r} can't be loaded: {why} "
                "Give a folder with tokenizer.json or the name of a model on the hub; "
                "a model with its own tokenizer code needs trust_remote_code."
            ) from error
        return cls(tokenizer)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text (no lone surrogates in it); with `add_special_tokens`, the tokenizer's own around
        them."""
        if self._fast:
            return self._encode(text, add_special_tokens)
        with self._lock:
            return self._encode(text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Not the backend's `encode`, which holds the GIL (tokenizers 0.23): 780k tokens stopped every other
        # thread for 1.3 s. By this way, through its `encode_batch`, for 0.09 s.
        encoding = self.hf(
            text,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about long prompts: the engine's limit is checked elsewhere
        )
        return list(encoding["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens skipped."""
        if self._fast:
            return self._decode(ids)
        with self._lock:
            return self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def detokenizer(self, continues: Sequence[int] = (), *, exact: bool = False) -> Detokenizer:
        """A detokenizer for one choice.

        Tokenizers of the SentencePiece kind write a space before a word, and drop it from the first word
        of a text. So whether an output begins with a space depends on what it is. With the prompt's ids in
        `continues` it goes on where the prompt ends: prompt and output together read as one text ("The
        capital of France is" + " Paris"); vLLM does that always. Without them it is a text of its own, as
        the answer in a chat is: nothing precedes the space there that it could separate, and vLLM's answers
        of such models begin with one for that reason. Only the last few of the ids are looked at.

        With `exact` the text is what `token_bytes` says, and begins with a space if they do.
        """
        context: list[int] = []
        for token_id in reversed(continues):
            if token_id not in self._special:
                context.append(token_id)
            if len(context) == CONTEXT_TOKENS:
                break
        return continued(self._new_detokenizer(exact), context[::-1])

    def _new_detokenizer(self, exact: bool = False) -> Detokenizer:
        match self._family:
            case ByteLevel():
                return ByteLevelDetokenizer(self._piece)
            case ByteFallback(strip=strip, strip_count=count):
                return ByteFallbackDetokenizer(self._piece, strip, 0 if exact else count)
        return WindowDetokenizer(self.decode, self._name)

    def _piece(self, token_id: int) -> Any:
        piece = self._pieces.get(token_id)
        if piece is None:
            assert self._family is not None
            piece = self._pieces[token_id] = self._family.piece(self._name(token_id))
        return piece

    def _name(self, token_id: int) -> str:
        """The token's entry in the vocabulary; "" for one that isn't text: special, or unknown (models pad
        their vocabulary beyond the tokenizer's)."""
        if token_id in self._special or not 0 <= token_id < self.vocab_size:
            return ""
        return self.hf.convert_ids_to_tokens(token_id) or ""

    def _special_ids(self) -> frozenset[int]:
        if self._fast:  # what its `decode` skips
            added = self._fast.get_added_tokens_decoder()
            return frozenset(token_id for token_id, token in added.items() if token.special)
        return frozenset(self.hf.all_special_ids)

    def _family_decodes_alike(self) -> bool:
        """Whether the recognised family says what `decode` says, on some tokens. It would not for a
        tokenizer class with a `decode` of its own, or if a later version of tokenizers decoded
        otherwise."""
        draw = random.Random(0)
        samples = [[draw.randrange(self.vocab_size) for _ in range(4)] for _ in range(64)]
        for ids in [self.encode(_SAMPLE, False), *samples]:
            detokenizer = self._new_detokenizer()
            shown = "".join([detokenizer.push(token_id) for token_id in ids])
            whole = self.decode(ids)
            if "\ufffd" not in whole and shown != whole:
                return False
        return True

    def token_bytes(self) -> list[bytes]:
        """What each token adds to a text, by id; b"" for one that isn't text (special, or none at all). Where
        several add the same, as "A" and <0x41> do, all but the one that the tokenizer prefers are b"".

        Raises:
            TokenizerError: it isn't of the two families in which a token adds the same wherever it stands.
        """
        if self._family is None:
            raise TokenizerError(
                "this model's tokenizer doesn't say what bytes a token stands for, wherever it stands"
            )
        pieces = [self._piece(token_id) for token_id in range(self.vocab_size)]
        preferred: dict[bytes, int] = {}
        # Bytes are only for what has no token of its own.
        for token_id, piece in sorted(enumerate(pieces), key=lambda each: isinstance(each[1], bytes)):
            preferred.setdefault(piece if isinstance(piece, bytes) else piece.encode(), token_id)
        tokens = [b""] * self.vocab_size
        for text, token_id in preferred.items():
            tokens[token_id] = text
        return tokens

    def token_string(self, token_id: int) -> tuple[str, list[int] | None]:
        """One token as OpenAI's logprobs show it: its text, and its UTF-8 bytes (None if it has none).

        The bytes are exact even where they are a part of a character; the text then has U+FFFD. Its space is
        kept, as in the middle of a text. The list is shared: don't change it.
        """
        found = self._strings.get(token_id)
        if found is None:
            found = self._strings[token_id] = self._token_string(token_id)
        return found

    def _token_string(self, token_id: int) -> tuple[str, list[int] | None]:
        if not 0 <= token_id < self.vocab_size:
            return "", None
        if token_id in self._special:
            piece = self.hf.convert_ids_to_tokens(token_id) or ""
        elif self._family:
            piece = self._piece(token_id)
        else:  # what the second of two adds, with its space
            piece = self.decode([token_id, token_id])[len(self.decode([token_id])) :]
        if isinstance(piece, str):
            return piece, list(piece.encode(errors="replace")) or None
        return piece.decode(errors="replace"), list(piece)
