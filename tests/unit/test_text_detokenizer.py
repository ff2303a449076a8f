"""Token ids back into text: nothing lost, nothing shown too early, nothing that depends on the way."""

import codecs
import itertools
import json
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmboost_worker.text import Detokenizer, Tokenizer
from llmboost_worker.text.detokenizer import (
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    WindowDetokenizer,
)
from tests.unit.text_tokenizers import (
    ALL,
    byte_fallback,
    byte_fallback_of_transformers,
    byte_level,
    byte_level_of_transformers,
    slow,
    token_id,
    unigram,
    word_piece,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    "a 😀👩‍👧好é�\n▁<0x", max_size=20
)


every_kind = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
every_family = pytest.mark.parametrize("make", [byte_level, byte_fallback])


def id_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids as an untrained model draws them, some beyond the tokenizer's vocabulary."""
    return st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30)


def shown(detokenizer: Detokenizer, ids: list[int]) -> str:
    return "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.flush()


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token a byte."""
    ids = ids_of_bytes(tokenizer)
    return [ids[bytes([byte])] for byte in data]


@cache
def ids_of_bytes(tokenizer: Tokenizer) -> dict[str | bytes, int]:
    return {tokenizer._piece(n): n for n in range(tokenizer.vocab_size)}


def test_the_kinds_are_recognised() -> None:
    """The exact detokenizers serve the families they were written for, the window all others."""
    kinds = {name: type(make().detokenizer()) for name, make in ALL.items()}
    assert kinds == {
        "byte_level": ByteLevelDetokenizer,
        "byte_fallback": ByteFallbackDetokenizer,
        "byte_fallback_unstripped": ByteFallbackDetokenizer,
        "unigram": WindowDetokenizer,
        "word_piece": WindowDetokenizer,
        "slow": WindowDetokenizer,
    }


def test_a_decode_of_its_own_is_not_taken_for_a_family() -> None:
    """A tokenizer class that decodes otherwise than its decoder says is decoded by its own `decode`."""
    hf = byte_level_of_transformers()

    class Shouting(type(hf)):  # type: ignore[misc]
        def _decode(self, *args: object, **kwargs: object) -> str:
            return super()._decode(*args, **kwargs).upper()

    hf.__class__ = Shouting
    tokenizer = Tokenizer(hf)
    assert shown(tokenizer.detokenizer(), tokenizer.encode("hello 你好", False)) == "HELLO 你好"


@every_kind
@settings(deadline=None)
@given(data=st.data())
def test_text_arrives_whole(make: Callable[[], Tokenizer], data: st.DataObject) -> None:
    """Of ids that encode a text, pushes and flush are what `decode` says of all of them at once."""
    tokenizer = make()
    text = data.draw(TEXTS)
    if make is slow:  # not told from an incomplete character: see `WindowDetokenizer`
        text = text.rstrip("�")
    ids = tokenizer.encode(text, False)
    assert shown(tokenizer.detokenizer(), ids) == tokenizer.decode(ids)


@settings(deadline=None)
@given(data=st.data())
def test_any_ids_arrive_as_decode_says(data: st.DataObject) -> None:
    """Byte-level: of any ids, invalid UTF-8 included, the text is that of `decode`, but for an incomplete
    end."""
    tokenizer = byte_level()
    ids = data.draw(id_lists(tokenizer))
    raw = b"".join(tokenizer._piece(n) for n in ids)
    whole, _ = codecs.utf_8_decode(raw, "replace", False)
    assert shown(tokenizer.detokenizer(), ids) == whole
    if raw.decode(errors="replace") == whole:  # no incomplete end
        assert tokenizer.decode(ids) == whole


BROKEN = [b"\xe4\xbd\xa0", b"\xf0\x9f", b"\x98\x80", b"\xed", b"\xa0", b"\xff", b"A", b"\xef\xbf\xbd"]


@settings(deadline=None)
@given(st.binary(max_size=12) | st.lists(st.sampled_from(BROKEN)).map(b"".join))
def test_any_bytes_arrive_as_decode_says(data: bytes) -> None:
    """Byte-level, a byte a token: the same, for what UTF-8 can be broken into."""
    tokenizer = byte_level()
    ids = byte_ids(tokenizer, data)
    text = shown(tokenizer.detokenizer(), ids)
    end = token_id(tokenizer, "A")  # makes an incomplete end an invalid one
    assert shown(tokenizer.detokenizer(), [*ids, end]) == tokenizer.decode([*ids, end])
    assert tokenizer.decode(ids).startswith(text)


@settings(deadline=None)
@given(data=st.data())
def test_any_ids_arrive_as_decode_says_with_byte_fallback(data: st.DataObject) -> None:
    """Byte fallback: the same, but for whole characters in a run of bytes that turns out invalid, which
    stay."""
    tokenizer = byte_fallback()
    ids = data.draw(id_lists(tokenizer) | st.lists(st.sampled_from(BYTE_RUN_IDS), max_size=12))
    assert shown(tokenizer.detokenizer(), ids) == expected_of_byte_fallback(ids)


BYTE_RUN_IDS = [
    token_id(byte_fallback(), token)
    for token in [
        "<0x41>",
        "<0xE4>",
        "<0xBD>",
        "<0xA0>",
        "<0xF0>",
        "<0xFF>",
        "<0x20>",
        "▁",
        "▁▁",
        "�",
        "</s>",
        "a",
    ]
]


def expected_of_byte_fallback(ids: list[int]) -> str:
    """`decode`, with each invalid run of bytes decoded in two parts: its whole characters, and the rest."""
    tokenizer, unstripped = byte_fallback(), byte_fallback(strip=False)
    ids = [n for n in ids if tokenizer._name(n)]
    runs = [
        (kind, list(run)) for kind, run in itertools.groupby(ids, key=lambda n: type(tokenizer._piece(n)))
    ]
    text = ""
    for position, (kind, run) in enumerate(runs):
        rest: list[int] = []
        if kind is bytes:
            try:
                b"".join(tokenizer._piece(n) for n in run).decode()
            except UnicodeDecodeError as error:
                run, rest = run[: error.start], run[error.start :]
                if position == len(runs) - 1 and error.reason == "unexpected end of data":
                    rest = []
        text += unstripped.decode(run) + unstripped.decode(rest)
    return text.removeprefix(" ")


@every_kind
@settings(deadline=None)
@given(data=st.data())
def test_a_replay_goes_on_as_if_never_interrupted(make: Callable[[], Tokenizer], data: st.DataObject) -> None:
    """A second detokenizer that reads a prefix of the ids shows what the first had shown, then goes on
    alike."""
    tokenizer = make()
    ids = data.draw(id_lists(tokenizer))
    unbroken = tokenizer.detokenizer()
    steps = [unbroken.push(n) for n in ids]
    cut = data.draw(st.integers(0, len(ids)))
    resumed = tokenizer.detokenizer()
    assert [resumed.push(n) for n in ids[:cut]] == steps[:cut]
    assert [resumed.push(n) for n in ids[cut:]] == steps[cut:]
    assert resumed.flush() == unbroken.flush()


@every_family
@pytest.mark.parametrize("text", ["👩‍👩‍👧 family", "你好，世界", "e\u0301 Ωmega", "🇫🇷👍🏽"])
def test_a_split_character_is_held_back_until_whole(make: Callable[[], Tokenizer], text: str) -> None:
    """However a character is split into bytes, it is shown once, whole, and U+FFFD never stands in for it."""
    tokenizer = make()
    detokenizer = tokenizer.detokenizer()
    data = text.encode()
    pieces = [detokenizer.push(n) for n in byte_ids(tokenizer, data)]
    ends = {len(text[:n].encode()): text[n - 1] for n in range(1, len(text) + 1)}
    assert pieces == [ends.get(n, "") for n in range(1, len(data) + 1)]


@every_family
def test_an_incomplete_end_is_dropped(make: Callable[[], Tokenizer]) -> None:
    """A sequence that ends by length in the middle of a character ends before that character."""
    tokenizer = make()
    ids = byte_ids(tokenizer, "ok 😀".encode()[:-1])
    assert shown(tokenizer.detokenizer(), ids) == "ok "
    assert "�" in tokenizer.decode(ids)


@every_family
def test_a_replacement_character_that_is_meant_is_shown_at_once(make: Callable[[], Tokenizer]) -> None:
    """U+FFFD by its own bytes EF BF BD is a character as any other."""
    tokenizer = make()
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(n) for n in byte_ids(tokenizer, "a�".encode())] == ["a", "", "", "�"]
    assert detokenizer.flush() == ""


def test_a_replacement_character_with_a_token_of_its_own_is_shown_at_once() -> None:
    """The same where the vocabulary has it."""
    detokenizer = byte_fallback().detokenizer()
    assert detokenizer.push(token_id(byte_fallback(), "�")) == "�"


def test_a_long_run_of_bytes_is_shown_character_by_character() -> None:
    """A script without tokens of its own streams: no waiting for the end of the run."""
    tokenizer = byte_fallback()
    text = "မြန်မာ" * 20
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(n) for n in byte_ids(tokenizer, text.encode())]
    assert [piece for piece in pieces if piece] == list(text)


@every_kind
def test_special_tokens_are_skipped(make: Callable[[], Tokenizer]) -> None:
    """Special tokens show nothing and separate nothing, not even the bytes of a character."""
    tokenizer = make()
    special = min(tokenizer._special)
    ids = tokenizer.encode("Hello world, hello", False)
    mixed = [token for n in ids for token in (special, n)]
    assert (
        shown(tokenizer.detokenizer(), mixed) == shown(tokenizer.detokenizer(), ids) == tokenizer.decode(ids)
    )
    if make in (byte_level, byte_fallback):
        first, *rest = byte_ids(tokenizer, "你".encode())
        assert shown(tokenizer.detokenizer(), [first, special, *rest]) == "你"


@pytest.mark.parametrize("make", [byte_fallback, unigram])
def test_the_first_space_of_a_text_of_its_own_is_dropped(make: Callable[[], Tokenizer]) -> None:
    """▁ before the first word separates it from nothing; before later words it is a space."""
    tokenizer = make()
    ids = tokenizer.encode("Hello world", False)
    assert tokenizer.hf.convert_ids_to_tokens(ids)[0].startswith("▁")
    assert shown(tokenizer.detokenizer(), ids) == "Hello world"


@every_kind
def test_a_continuation_reads_as_one_text_with_its_prompt(make: Callable[[], Tokenizer]) -> None:
    """The prompt's text and the output's are the text of both, whatever the prompt ends with."""
    tokenizer = make()
    whole = tokenizer.encode("The capital of France is Paris. How are you today?", False)
    special = min(tokenizer._special)
    for cut in range(1, len(whole)):
        prompt, output = [special, *whole[:cut], special], whole[cut:]
        text = tokenizer.decode(prompt) + shown(tokenizer.detokenizer(continues=prompt), output)
        assert text == tokenizer.decode(whole)


def test_special_tokens_between_prompt_and_output_hide_nothing() -> None:
    """However many special tokens end the prompt, its text is still there to continue."""
    tokenizer = byte_fallback()
    prompt = tokenizer.encode("Hello", False) + [token_id(tokenizer, "</s>")] * 50
    assert shown(tokenizer.detokenizer(continues=prompt), tokenizer.encode("world", False)) == " world"


@every_family
def test_a_character_that_the_prompt_began_is_shown_by_the_output(make: Callable[[], Tokenizer]) -> None:
    """A prompt of ids may end inside a character; it becomes whole, and visible, in the output."""
    tokenizer = make()
    *prompt, last = byte_ids(tokenizer, "ok 😀".encode())
    assert shown(tokenizer.detokenizer(continues=prompt), [last]) == "😀"


def test_a_prompt_of_special_tokens_is_no_text_to_continue() -> None:
    """After a lone <s> the output is the beginning of the text."""
    tokenizer = byte_fallback()
    ids = tokenizer.encode("Hello world", False)
    start = token_id(tokenizer, "<s>")
    assert shown(tokenizer.detokenizer(continues=[start]), ids) == "Hello world"


def test_cost_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window decodes a bounded number of ids at each token, also when nothing becomes visible."""
    tokenizer = word_piece()
    sizes: list[int] = []
    decode = tokenizer._decode
    monkeypatch.setattr(tokenizer, "_decode", lambda ids: sizes.append(len(ids)) or decode(ids))
    detokenizer = tokenizer.detokenizer()
    for n in tokenizer.encode(" ".join(["hello world"] * 200), False):
        detokenizer.push(n)
    assert len(sizes) > 400
    assert max(sizes) <= 2 * WindowDetokenizer.MAX_HELD


def window(tokenizer: Tokenizer) -> WindowDetokenizer:
    """Through the window what has a detokenizer of its own."""
    return WindowDetokenizer(tokenizer.decode, tokenizer._name)


@every_family
@settings(deadline=None)
@given(text=TEXTS)
def test_a_window_shows_whole_characters_too(make: Callable[[], Tokenizer], text: str) -> None:
    """Text arrives whole and no U+FFFD stands in for a part of a character, however tokens split it."""
    tokenizer = make()
    text = text.replace("�", "")
    detokenizer = window(tokenizer)
    pieces = [detokenizer.push(n) for n in byte_ids(tokenizer, text.encode())]
    assert not any("�" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(byte_ids(tokenizer, text.encode()))


@every_family
def test_a_window_drops_an_incomplete_end(make: Callable[[], Tokenizer]) -> None:
    """As the other detokenizers do."""
    tokenizer = make()
    assert shown(window(tokenizer), byte_ids(tokenizer, "ok 😀".encode()[:-1])) == "ok "


def test_a_window_shows_a_replacement_character_with_a_token_of_its_own_at_once() -> None:
    """Its name says that it isn't a part of a character."""
    assert window(byte_fallback()).push(token_id(byte_fallback(), "�")) == "�"


def test_a_window_holds_back_no_more_than_its_bound() -> None:
    """Ids that are never a whole character are shown as U+FFFD in the end, not hoarded."""
    names = dict.fromkeys(range(100), "x")
    detokenizer = WindowDetokenizer(lambda ids: "�" * len(ids), names.__getitem__)
    pieces = [detokenizer.push(n) for n in range(100)]
    assert max(len(piece) for piece in pieces) == WindowDetokenizer.MAX_HELD
    assert sum(map(len, pieces)) >= 100 - WindowDetokenizer.MAX_HELD


@pytest.mark.parametrize(
    "decoder",
    [
        '{"type":"Sequence","decoders":[{"type":"ByteFallback"},{"type":"Metaspace","replacement":"▁",'
        '"prepend_scheme":"always","split":true}]}',
        None,
    ],
)
def test_unusual_decoders_are_read_through_the_window(decoder: str | None) -> None:
    """A decoder that isn't one of the two families is asked, not guessed."""
    hf = byte_fallback_of_transformers()
    spec = json.loads(hf.backend_tokenizer.to_str())
    spec["decoder"] = json.loads(decoder) if decoder else None
    hf._tokenizer = type(hf.backend_tokenizer).from_str(json.dumps(spec))
    tokenizer = Tokenizer(hf)
    assert isinstance(tokenizer.detokenizer(), WindowDetokenizer)
    ids = tokenizer.encode("Hello world 😀 héllo", False)
    assert shown(tokenizer.detokenizer(), ids) == tokenizer.decode(ids)
