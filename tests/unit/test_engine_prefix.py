"""Requests that begin alike compute the beginning once, and nobody can tell from what they say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engine_models import (
    CONFIGS,
    PER_TOKEN,
    POISON,
    Collected,
    Driver,
    driving,
    prompt,
    request,
    save_model,
)

SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}]


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(CONFIGS[request.param], tmp_path_factory.mktemp(request.param), poison=POISON)


@pytest.fixture
def driver(folder: Path) -> Iterator[Driver]:
    with driving(folder, max_num_batched_tokens=64, max_num_seqs=8) as driver:
        yield driver


def sound(id: str, prompt_ids: list[int], *arguments: Any, **options: Any) -> Any:
    """Never draws the poisoned token."""
    return request(id, prompt_ids, *arguments, **{"logit_bias": {POISON: -1000.0}, **options})


def answers(results: list[Collected]) -> list[tuple[list[int], str | None]]:
    return [(result.token_ids, result.finish_reason) for result in results]


def test_with_and_without_the_prefix_cache_the_same_is_said(folder: Path) -> None:
    """Conversations of three turns beside each other, with shared beginnings, greedy and random."""
    heard = []
    for enabled in (True, False):
        with driving(
            folder, max_num_batched_tokens=64, max_num_seqs=6, enable_prefix_caching=enabled
        ) as driver:
            said: list[list[int]] = [[*prompt(40), *prompt(5 + n % 3, seed=n % 3)] for n in range(6)]
            for _ in range(3):
                results = driver.run(*(sound(f"{n}", ids, **SAMPLINGS[n % 2]) for n, ids in enumerate(said)))
                said = [ids + r.token_ids + prompt(7) for ids, r in zip(said, results, strict=True)]
            stats = driver.engine.stats()
            assert (stats.cached_tokens > 18 * 32) == enabled
            assert stats.cached_tokens or not enabled
            heard.append(said)
    assert heard[0] == heard[1]


def test_a_second_time_all_but_the_last_tokens_are_found(driver: Driver) -> None:
    """Those after the last full block; of a prompt of full blocks, the last of them: its end must be
    computed, to know what follows."""
    for length, found in ((16, 0), (17, 16), (47, 32), (48, 32), (100, 96)):
        ids = prompt(length)
        first = driver.run_one(sound("first", ids))
        second = driver.run_one(sound("second", ids))
        assert (first.cached_tokens, second.cached_tokens) == (0, found)
        assert answers([first]) == answers([second])


def test_the_next_turn_of_a_conversation_finds_the_answer_of_the_last(driver: Driver) -> None:
    """The last token drawn was never computed."""
    first = driver.run_one(sound("first", prompt(30), max_tokens=35, ignore_eos=True))
    second = driver.run_one(sound("second", [*prompt(30), *first.token_ids, *prompt(9)]))
    assert second.cached_tokens == 64


def test_of_a_resumed_sequence_the_tokens_of_the_prompt_count(driver: Driver) -> None:
    """What it had said before is found too, but is none of the prompt."""
    whole = driver.run_one(sound("whole", prompt(30), max_tokens=40, ignore_eos=True))
    before = driver.engine.stats().prompt_tokens
    rest = driver.run_one(sound("rest", prompt(30), whole.token_ids[:30], max_tokens=40, ignore_eos=True))
    assert whole.token_ids == whole.token_ids[:30] + rest.token_ids
    assert rest.cached_tokens == 30
    assert driver.engine.stats().prompt_tokens == before


def test_choices_of_one_request_compute_its_prompt_once(driver: Driver) -> None:
    asked = [sound(f"{n}", prompt(100), temperature=1.0, seed=1, choice=n) for n in range(6)]
    results = driver.run(*asked)
    assert [result.cached_tokens for result in results] == [0] + [96] * 5
    assert driver.engine.stats().prompt_tokens == 100 + 5 * 4


def test_a_cancelled_prompt_leaves_those_that_waited_for_it_to_themselves(driver: Driver) -> None:
    asked = [sound(f"{n}", prompt(400), max_tokens=2) for n in range(4)]
    alone = driver.run_one(sound("alone", prompt(400), max_tokens=2)).token_ids
    driver.engine.add(asked)
    driver.engine.cancel(["0"])
    driver.wait(lambda: all(driver.finished(f"{n}") for n in (1, 2, 3)))
    assert [driver.tokens(f"{n}") for n in (1, 2, 3)] == [alone] * 3


def test_what_failed_is_not_found_and_fails_each_time(driver: Driver) -> None:
    """A prompt with keys and values that are no numbers, in the first of several chunks: it ends at once, and
    others that begin with the tokens before them are not harmed. Those that waited for it try themselves."""
    ids = [*prompt(60), POISON, *prompt(200)]
    results = driver.run(*(sound(f"{n}", ids) for n in range(3)))
    assert [result.finish_reason for result in results] == ["error"] * 3
    assert all("not numbers" in (result.error or "") for result in results)
    assert driver.engine.stats().steps == 3
    assert driver.run_one(sound("again", ids)).finish_reason == "error"
    beginning = driver.run_one(sound("beginning", ids[:60]))
    with_others = driver.run(*(sound(f"other-{n}", prompt(20 + n, seed=n)) for n in range(8)))
    assert beginning.finish_reason in ("length", "stop")
    assert all(result.finish_reason in ("length", "stop") for result in with_others)
    assert driver.engine.stats().blocks_used == 0


def test_forty_sequences_in_a_cache_for_three(folder: Path) -> None:
    """They give way to each other, keep what they can, and say what they say alone."""
    asked = [
        sound(f"{n}", prompt(40 + n % 7, seed=n % 11), max_tokens=30, ignore_eos=True, **SAMPLINGS[n % 2])
        for n in range(40)
    ]
    with driving(folder, max_num_batched_tokens=64, max_num_seqs=40) as driver:
        expected = answers(driver.run(*asked))
    room = (3 * 80 + 16) * PER_TOKEN / 2**30
    with driving(
        folder, max_num_batched_tokens=64, max_num_seqs=40, kv_cache_memory=room, max_model_len=80
    ) as driver:
        assert driver.engine.stats().blocks_total == 3 * 80 // 16
        assert answers(driver.run(*asked)) == expected
        assert driver.engine.stats().blocks_used == 0
        assert [driver.run_one(one).token_ids for one in asked[:2]] == [ids for ids, _ in expected[:2]]


def test_the_cache_is_no_larger_than_all_sequences_need(folder: Path) -> None:
    with driving(folder, max_num_seqs=3, max_model_len=100, kv_cache_memory=1.0) as driver:
        assert driver.engine.stats().blocks_total == 3 * 7
