"""The tokenizer: loading, encoding in threads, and tokens as logprobs show them."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from llmboost_worker.text import Tokenizer, TokenizerError
from tests.unit.text_tokenizers import (
    ALL,
    CORPUS,
    byte_fallback,
    byte_level,
    byte_level_of_transformers,
    token_id,
    unigram,
    word_piece,
)


def test_importing_loads_neither_torch_nor_transformers() -> None:
    """A process that never loads a model doesn't pay for them."""
    code = "import sys, llmboost_worker.text; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_loading_a_folder(tmp_path: Path) -> None:
    """A saved tokenizer loads with its template and encodes as it did."""
    byte_level_of_transformers().save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.encode(CORPUS[0], True) == byte_level().encode(CORPUS[0], True)
    assert tokenizer.vocab_size == byte_level().vocab_size


@pytest.mark.parametrize("broken", ["nothing", "not json", "not a tokenizer"])
def test_what_cannot_be_loaded_is_said_with_a_remedy(tmp_path: Path, broken: str) -> None:
    """The operator learns which model, what was wrong and what to give instead."""
    if broken != "nothing":
        (tmp_path / "tokenizer.json").write_text("{" if broken == "not json" else json.dumps({"model": 1}))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as raised:
        Tokenizer.load(str(tmp_path))
    assert repr(str(tmp_path)) in str(raised.value)


def test_an_error_that_is_only_a_name_is_said_with_its_kind(tmp_path: Path) -> None:
    byte_level_of_transformers().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"loaded: KeyError: '\w+'\. Give"):
        Tokenizer.load(str(tmp_path))


def test_encoding_in_threads_is_encoding_in_one() -> None:
    """Requests that encode, decode and detokenize at the same time don't disturb each other, even if the
    tokenizer came with truncation and padding set."""
    hf = byte_level_of_transformers()
    hf.backend_tokenizer.enable_truncation(4)
    hf.backend_tokenizer.enable_padding(length=8)
    tokenizer = Tokenizer(hf)
    texts = [text * 50 for text in dict.fromkeys(CORPUS)]
    expected = [byte_level().encode(text, False) for text in texts]

    def work(n: int) -> bool:
        ids = tokenizer.encode(texts[n % len(texts)], False)
        detokenizer = tokenizer.detokenizer()
        text = "".join([detokenizer.push(token) for token in ids])
        return ids == expected[n % len(texts)] and text == tokenizer.decode(ids) == texts[n % len(texts)]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(100)))


@pytest.mark.parametrize("decoder", [decoders.ByteLevel(), decoders.Metaspace()])
def test_nothing_is_left_to_set_for_the_first_thread(decoder: decoders.Decoder) -> None:
    """Truncation and padding are off from the start: to set them while another thread encodes is an error."""
    hf = byte_level_of_transformers()
    hf.backend_tokenizer.decoder = decoder
    hf.backend_tokenizer.enable_truncation(4)
    hf.backend_tokenizer.enable_padding(length=8)
    Tokenizer(hf)
    assert (hf.backend_tokenizer.truncation, hf.backend_tokenizer.padding) == (None, None)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_token_strings_put_together_are_the_text(make: Any) -> None:
    """Tokens as logprobs show them, put together, are the text, by string and by bytes."""
    tokenizer: Tokenizer = make()
    ids = tokenizer.encode("The quick brown fox", False)
    strings, lists = zip(*map(tokenizer.token_string, ids), strict=True)
    assert "".join(strings).strip() == tokenizer.decode(ids).strip()
    assert b"".join(map(bytes, lists)).decode() == "".join(strings)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=["byte_level", "byte_fallback"])
def test_token_bytes_put_together_are_the_text(make: Any, text: str) -> None:
    """Bytes are exact even where a token is a part of a character."""
    tokenizer: Tokenizer = make()
    ids = tokenizer.encode(text, False)
    whole = b"".join(bytes(tokenizer.token_string(n)[1] or []) for n in ids).decode()
    assert whole in (tokenizer.decode(ids), " " + tokenizer.decode(ids))  # the first space shows in no text


@pytest.mark.parametrize(
    ("tokenizer", "token", "expected"),
    [
        (byte_level(), "Ġt", (" t", [32, 116])),
        (byte_level(), "Ċ", ("\n", [10])),
        (byte_level(), "ð", ("�", [0xF0])),
        (byte_level(), "<|end|>", ("<|end|>", list(b"<|end|>"))),
        (byte_level(), "工具 é", ("工具 é", list("工具 é".encode()))),
        (byte_fallback(), "<0xF0>", ("�", [0xF0])),
        (byte_fallback(), "<0x0A>", ("\n", [10])),
        (byte_fallback(), "▁▁", ("  ", [32, 32])),
        (byte_fallback(), "</s>", ("</s>", list(b"</s>"))),
        (unigram(), "▁", (" ", [32])),
        (word_piece(), "##o", ("o", [111])),
        (word_piece(), "the", (" the", list(b" the"))),
    ],
)
def test_token_strings(tokenizer: Tokenizer, token: str, expected: tuple[str, list[int]]) -> None:
    """One token: its text with its space, and its bytes, of each kind of vocabulary."""
    assert tokenizer.token_string(token_id(tokenizer, token)) == expected


def test_an_unknown_id_has_no_bytes() -> None:
    """A model's vocabulary may be padded beyond the tokenizer's; such an id is shown as nothing."""
    assert byte_level().token_string(byte_level().vocab_size) == ("", None)
    assert byte_level().detokenizer().push(byte_level().vocab_size) == ""
