"""What a sequence says depends on its request alone: not on neighbours, nor on where an attempt broke off."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engine_kinds import ENGINES
from tests.unit.engine_models import CONFIGS, EOS, VOCAB, Driver, driving, prompt, request, save_model

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "random": {"temperature": 1.0, "seed": 11},
    "filtered": {"temperature": 1.2, "seed": 12, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalised": {
        "temperature": 1.0,
        "seed": 13,
        "presence_penalty": 0.9,
        "frequency_penalty": 0.6,
        "repetition_penalty": 1.3,
    },
    "greedy-penalised": {"frequency_penalty": 1.5, "repetition_penalty": 1.2},
    "held-back": {"temperature": 1.0, "seed": 14, "min_tokens": 12, "logit_bias": {EOS: 4.0}},
    "second-choice": {"temperature": 1.0, "seed": 11, "choice": 1},
}
PROMPT = prompt(30)


@pytest.fixture(scope="module", params=["llama", "gemma2", *set(ENGINES) - {"transformers"}])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """Two models in the transformers engine, and one in each other engine that is installed."""
    if request.param == "vllm":
        yield request.getfixturevalue("vllm_driver")
        return
    folder: Path = save_model(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))
    with driving(folder, max_num_batched_tokens=64, max_num_seqs=24) as driver:
        yield driver


def whole(driver: Driver, sampling: dict[str, Any]) -> tuple[list[int], str | None]:
    result = driver.run_one(request("whole", PROMPT, max_tokens=20, **sampling))
    return result.token_ids, result.finish_reason


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_busy_mixed_batch_changes_nothing(driver: Driver, name: str) -> None:
    alone = whole(driver, SAMPLINGS[name])
    others = [
        request(f"other-{i}", prompt(1 + 17 * i, seed=5), max_tokens=5 + 3 * i, **sampling)
        for i, sampling in enumerate(list(SAMPLINGS.values()) * 3)
    ]
    *_, result = driver.run(*others, request("busy", PROMPT, max_tokens=20, **SAMPLINGS[name]))
    assert (result.token_ids, result.finish_reason) == alone


@pytest.mark.parametrize("name", SAMPLINGS)
def test_resuming_from_any_prefix_continues_the_unbroken_sequence(driver: Driver, name: str) -> None:
    tokens, reason = whole(driver, SAMPLINGS[name])
    resumed = driver.run(
        *(
            request(f"from-{cut}", PROMPT, tokens[:cut], max_tokens=20, **SAMPLINGS[name])
            for cut in range(len(tokens))
        )
    )
    for cut, result in enumerate(resumed):
        assert (tokens[:cut] + result.token_ids, result.finish_reason) == (tokens, reason)


def test_seeds_and_choices_differ(driver: Driver) -> None:
    """Six streams of random numbers, six texts; the same stream again, the same text."""
    asked = [(seed, choice) for seed in (1, 2, 3) for choice in (0, 1)] * 2
    results = driver.run(
        *(
            request(f"{i}", PROMPT, temperature=1.0, seed=seed, choice=choice, ignore_eos=True)
            for i, (seed, choice) in enumerate(asked)
        )
    )
    texts = [tuple(result.token_ids) for result in results]
    assert len(set(texts)) == 6
    assert texts[:6] == texts[6:]


@pytest.mark.parametrize(
    ("output_ids", "options", "reason"),
    [
        ([5] * 8, {"max_tokens": 8}, "length"),
        ([5] * 9, {"max_tokens": 8}, "length"),
        ([], {"max_tokens": 0}, "length"),
        ([5, EOS], {"max_tokens": 8}, "stop"),
        ([5, EOS], {"max_tokens": 2}, "stop"),
        ([5, 77], {"max_tokens": 8, "stop_token_ids": (77,)}, "stop"),
    ],
    ids=str,
)
def test_a_complete_sequence_finishes_without_another_token(
    driver: Driver, output_ids: list[int], options: dict[str, Any], reason: str
) -> None:
    result = driver.run_one(request("complete", PROMPT, output_ids, **options))
    assert (result.token_ids, result.finish_reason) == ([], reason)


def test_an_end_of_sequence_that_is_ignored_does_not_complete_a_resumed_one(driver: Driver) -> None:
    result = driver.run_one(request("ignoring", PROMPT, [5, EOS], max_tokens=6, ignore_eos=True))
    assert (len(result.token_ids), result.finish_reason) == (4, "length")


def test_max_tokens_counts_the_output_of_earlier_attempts(driver: Driver) -> None:
    result = driver.run_one(request("limited", PROMPT, [5, 6, 7], max_tokens=10, ignore_eos=True))
    assert (len(result.token_ids), result.finish_reason) == (7, "length")


def test_eos_ends_a_sequence_and_is_part_of_it(driver: Driver) -> None:
    result = driver.run_one(request("eos", PROMPT, logit_bias={EOS: 1000.0}))
    assert (result.token_ids, result.finish_reason) == ([EOS], "stop")


def test_ignored_eos_is_a_token_like_any_other(driver: Driver) -> None:
    result = driver.run_one(request("eos", PROMPT, max_tokens=5, ignore_eos=True, logit_bias={EOS: 1000.0}))
    assert (result.token_ids, result.finish_reason) == ([EOS] * 5, "length")


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_ids_end_a_sequence(driver: Driver, ignore_eos: bool) -> None:
    stop = {"stop_token_ids": (9, 77), "logit_bias": {77: 1000.0}, "ignore_eos": ignore_eos}
    result = driver.run_one(request("stop", PROMPT, **stop))
    assert (result.token_ids, result.finish_reason) == ([77], "stop")


def test_min_tokens_holds_every_stop_back(driver: Driver) -> None:
    """The bias makes every step draw a stop as soon as it may."""
    bias = {"stop_token_ids": (77,), "logit_bias": {77: 1000.0, EOS: 1000.0}, "min_tokens": 6}
    result = driver.run_one(request("held", PROMPT, **bias))
    assert (len(result.token_ids), result.finish_reason) == (7, "stop")
    assert not {77, EOS} & set(result.token_ids[:6])


def test_one_logprob_comes_with_each_token(driver: Driver) -> None:
    """Greedily drawn, a token is the first of the top ones and has their logprob."""
    result = driver.run_one(request("logprobs", PROMPT, max_tokens=6, ignore_eos=True, top_logprobs=3))
    assert len(result.logprobs) == len(result.token_ids) == 6
    for token, logprobs in zip(result.token_ids, result.logprobs, strict=True):
        assert len(logprobs.top) == 3
        assert logprobs.top[0] == (token, logprobs.logprob)


def test_every_token_of_the_vocabulary_can_be_forced(driver: Driver) -> None:
    results = driver.run(
        *(
            request(f"{token}", PROMPT, max_tokens=1, logit_bias={token: 1000.0})
            for token in range(0, VOCAB, 13)
        )
    )
    assert [result.token_ids for result in results] == [[token] for token in range(0, VOCAB, 13)]
