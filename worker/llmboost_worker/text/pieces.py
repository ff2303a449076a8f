"""What each token adds to a text, for the two families of tokenizer in which that can be said token by token.

Byte-level BPE (GPT-2, Llama 3, Qwen): a token is bytes, and a text is the UTF-8 reading of all of them.
Byte fallback (Llama 2, Mistral, Gemma): a token is text, with ▁ for a space, or one byte `<0xNN>`.

Both are recognised by the decoder in `tokenizer.json`; https://huggingface.co/docs/tokenizers/api/decoders
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class ByteLevel:
    """Every token is bytes."""

    piece: Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class ByteFallback:
    """A token is text or one byte."""

    piece: Callable[[str], str | bytes]
    strip: str
    """The character that is dropped from the beginning of a text; "" for none."""
    strip_count: int
    """At most this many of them."""


def recognise(backend: Any) -> ByteLevel | ByteFallback | None:
    """How this `tokenizers.Tokenizer` decodes, or None if it isn't one of the two families."""
    spec = json.loads(backend.to_str())["decoder"]
    steps = _flatten(spec) if spec else []
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return ByteLevel(bytes_of_alphabet)

    replacements: list[tuple[str, str]] = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    names = [step["type"] for step in steps]
    if names[:2] != ["ByteFallback", "Fuse"] or names[2:] not in ([], ["Strip"]):
        return None
    strip: dict[str, Any] = steps[2] if len(steps) == 3 else {"content": "", "start": 0, "stop": 0}
    if strip["stop"]:  # the end of a text isn't known while it grows
        return None

    def piece(token: str) -> str | bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token

    return ByteFallback(piece, strip["content"], strip["start"])


def _flatten(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [step for inner in spec["decoders"] for step in _flatten(inner)]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it is printable, else the next from U+0100 on.

    Source: `bytes_to_unicode` in https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def bytes_of_alphabet(token: str) -> bytes:
    """The bytes of a byte-level token; a token with any other character in it (an added one) is its own
    UTF-8."""
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()
