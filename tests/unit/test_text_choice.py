"""One choice's visible text is a function of its ids: an interrupted one goes on as if it never had been."""

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmboost.jobs import Grammar, SamplingParams
from llmboost_worker.text import ChoiceText, Tokenizer
from tests.unit.text_tokenizers import ALL, byte_fallback, byte_level, token_id

STOPS = st.lists(st.sampled_from(["a", "lo", "世", "😀", " w", "\n\n", "world", "�", "👩‍👧"]), max_size=4)
TEXT_PARTS = st.lists(
    st.sampled_from(["a", "hello", " world", "\n", "世界", "😀", "👩‍👩‍👧", "�", "b l o"]), max_size=8
)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tokenizer, SamplingParams, list[int], list[int]]:
    """A tokenizer, parameters, a prompt's ids and an output's: of text, or any."""
    tokenizer = ALL[draw(st.sampled_from(sorted(ALL)))]()
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size), max_size=12)
    ids = draw(TEXT_PARTS.map(lambda parts: tokenizer.encode("".join(parts), False)) | any_ids)
    sampling = SamplingParams(
        stop=tuple(draw(STOPS)),
        min_tokens=draw(st.integers(0, 6)),
        include_stop_str_in_output=draw(st.booleans()),
        stop_token_ids=tuple(draw(st.lists(st.sampled_from(ids or [0]), max_size=1))),
    )
    return tokenizer, sampling, draw(any_ids), ids


@settings(deadline=None)
@given(choices(), st.integers(0, 100))
def test_replaying_a_prefix_changes_nothing(
    choice: tuple[Tokenizer, SamplingParams, list[int], list[int]], cut: int
) -> None:
    """text(prefix) + text(rest) == text(whole), token by token, for every cut; the stop is at the same
    token."""
    tokenizer, sampling, prompt, ids = choice
    cut %= len(ids) + 1
    whole = ChoiceText(tokenizer, sampling, prompt)
    deltas = [whole.push(n) for n in ids]
    end = whole.finish()

    resumed = ChoiceText(tokenizer, sampling, prompt)
    assert resumed.replay(ids[:cut]) == "".join([delta.text for delta in deltas[:cut]])
    assert [resumed.push(n) for n in ids[cut:]] == deltas[cut:]
    assert resumed.finish() == end
    assert (resumed.stopped, resumed.tokens) == (whole.stopped, whole.tokens)


@settings(deadline=None)
@given(choices())
def test_a_stop_never_leaks(choice: tuple[Tokenizer, SamplingParams, list[int], list[int]]) -> None:
    """What is visible is the text before its first stop string, and nothing follows that."""
    tokenizer, sampling, _, ids = choice
    sampling = msgspec.structs.replace(sampling, stop_token_ids=(), min_tokens=0)
    unstopped = ChoiceText(tokenizer, SamplingParams())
    text = unstopped.replay(ids) + unstopped.finish()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in sampling.stop if stop in text]
    choice_text = ChoiceText(tokenizer, sampling)
    visible = choice_text.replay(ids) + choice_text.finish()
    if not found:
        assert (visible, choice_text.stopped) == (text, False)
        return
    end, start = min(found)
    assert (visible, choice_text.stopped) == (
        text[: end if sampling.include_stop_str_in_output else start],
        True,
    )
    assert choice_text.push(ids[-1]).text == choice_text.finish() == ""


def test_a_stop_is_found_across_tokens_and_ends_at_its_token() -> None:
    """The choice ends with the token that completes a stop string; tokens after it aren't counted."""
    tokenizer = byte_level()
    ids = tokenizer.encode("Hello, world! The", False)
    choice = ChoiceText(tokenizer, SamplingParams(stop=("ld! T",)))
    deltas = [choice.push(n) for n in ids]
    assert "".join([delta.text for delta in deltas]) == "Hello, wor"
    first = [delta.stopped for delta in deltas].index(True)
    assert "ld! T" in tokenizer.decode(ids[: first + 1])
    assert "ld! T" not in tokenizer.decode(ids[:first])
    assert choice.tokens == first + 1


@pytest.mark.parametrize(("min_tokens", "visible"), [(0, ""), (1, ""), (2, "a"), (3, "aa"), (9, "aaaa")])
def test_no_stop_before_min_tokens(min_tokens: int, visible: str) -> None:
    """A stop string counts from the token on that makes `min_tokens` full; earlier ones are text."""
    tokenizer = byte_level()
    a = token_id(tokenizer, "a")
    choice = ChoiceText(tokenizer, SamplingParams(stop=("a",), min_tokens=min_tokens))
    assert choice.replay([a] * 4) + choice.finish() == visible


def test_what_was_held_back_is_shown_at_the_end() -> None:
    """A sequence that ends in the beginning of a stop string ends with that."""
    tokenizer = byte_level()
    choice = ChoiceText(tokenizer, SamplingParams(stop=("world!!",)))
    assert choice.replay(tokenizer.encode("Hello, world!", False)) == "Hello, "
    assert (choice.finish(), choice.stopped) == ("world!", False)


def test_a_stop_token_before_min_tokens_is_text() -> None:
    """A stop token that ends nothing is a token as any other."""
    tokenizer = byte_level()
    tool = token_id(tokenizer, "<tool>")
    choice = ChoiceText(tokenizer, SamplingParams(stop_token_ids=(tool,), min_tokens=2))
    assert choice.replay([tool, tool]) == "<tool>"


@pytest.mark.parametrize("include", [False, True])
def test_stop_tokens_are_text_only_if_included(include: bool) -> None:
    """The token that ended the sequence is hidden, also where the tokenizer takes it for text."""
    tokenizer = byte_level()
    a, tool = token_id(tokenizer, "a"), token_id(tokenizer, "<tool>")
    for sampling, end_ids in [({"stop_token_ids": (tool,)}, ()), ({}, (tool,))]:
        choice = ChoiceText(
            tokenizer, SamplingParams(**sampling, include_stop_str_in_output=include), end_ids=end_ids
        )
        assert choice.replay([a, tool]) + choice.finish() == ("a<tool>" if include else "a")


def test_an_ignored_end_token_is_text() -> None:
    """With `ignore_eos` the end-of-sequence token is a token as any other."""
    tokenizer = byte_level()
    a, tool = token_id(tokenizer, "a"), token_id(tokenizer, "<tool>")
    choice = ChoiceText(tokenizer, SamplingParams(ignore_eos=True), end_ids=(tool,))
    assert choice.replay([a, tool, a]) == "a<tool>a"


@example(cut=1)
@settings(deadline=None)
@given(cut=st.integers(0, 6))
def test_a_chat_answer_is_its_own_text_and_a_completion_goes_on(cut: int) -> None:
    """The first ▁ is a space only where the output continues the prompt's text."""
    tokenizer = byte_fallback()
    prompt, ids = tokenizer.encode("Hello", False), tokenizer.encode("Paris is", False)
    for continues, text in [((), "Paris is"), (prompt, " Paris is")]:
        choice = ChoiceText(tokenizer, SamplingParams(), continues)
        assert choice.replay(ids[:cut]) + choice.replay(ids[cut:]) == text


def test_what_is_held_to_a_grammar_is_shown_to_its_first_space_and_without_its_end() -> None:
    """A pattern that begins with a space is met by what the reader sees, and `ignore_eos` makes no text of
    the end, which the grammar asked for."""
    tokenizer = byte_fallback()
    space, x = token_id(tokenizer, "▁"), token_id(tokenizer, "x")
    free, held = (
        SamplingParams(ignore_eos=True),
        SamplingParams(ignore_eos=True, grammar=Grammar("regex", " x")),
    )
    assert ChoiceText(tokenizer, free, end_ids=[x]).replay([space, x]) == "x"
    assert ChoiceText(tokenizer, held).replay([space, x]) == " x"
    assert ChoiceText(tokenizer, held, end_ids=[x]).replay([space, x]) == " "
