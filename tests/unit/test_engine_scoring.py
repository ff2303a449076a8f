"""Logprobs of prompts: those of transformers' own forward, in bounded steps, once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmboost_worker.engine.interface import TokenLogprobs
from llmboost_worker.engine.transformers.runner import ModelRunner
from llmboost_worker.engine.transformers.sampling import scoring
from llmboost_worker.engine.transformers.sequence import Sequence
from tests.unit.engine_models import CONFIGS, Driver, driving, prompt, request, save_model


# Of the second the logits are capped after the projection, which must not be left out.
@pytest.fixture(scope="module", params=["llama", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Driver]:
    with driving(folder, max_num_batched_tokens=48, max_num_seqs=8) as driver:
        yield driver


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """At most 16 rows are scored in a step; the sizes of the steps."""
    monkeypatch.setattr(scoring, "MOST_ROWS", 16)
    sizes: list[int] = []
    take = scoring.PromptScores.take

    def recorded(self: scoring.PromptScores, logits: torch.Tensor) -> None:
        sizes.append(len(logits))
        take(self, logits)

    monkeypatch.setattr(scoring.PromptScores, "take", recorded)
    return sizes


def check(folder: Path, ids: list[int], scores: list[TokenLogprobs | None] | None, k: int) -> None:
    """The scores are the log_softmax of a plain forward over the prompt."""
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)
    assert scores is not None
    assert len(scores) == len(ids)
    assert scores[0] is None
    for position, score in enumerate(scores[1:], start=1):
        row = expected[position - 1]
        assert score is not None
        assert score.logprob == pytest.approx(float(row[ids[position]]), abs=1e-3)
        best = row.topk(k)
        assert [value for _, value in score.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert {id for id, value in score.top if value > best.values[-1] + 1e-3} <= set(best.indices.tolist())


def test_they_are_those_of_a_plain_forward(driver: Driver, folder: Path, narrow: list[int]) -> None:
    """For prompts of one chunk and of many, beside sequences that want none, whose tokens are the same."""
    others = [request(f"{i}", prompt(30 + i), max_tokens=20, ignore_eos=True) for i in range(3)]
    alone = driver.run(*others)
    wanted = [(1, 0), (2, 1), (40, 5), (150, 2), (33, 0)]
    scored = [
        request(f"s{i}", prompt(length), max_tokens=4, ignore_eos=True, prompt_logprobs=k)
        for i, (length, k) in enumerate(wanted)
    ]
    unscored = [
        request(f"u{i}", one.prompt_ids, max_tokens=4, ignore_eos=True) for i, one in enumerate(scored)
    ]
    expected = driver.run(*unscored)
    results = driver.run(*others[:1], *scored, *others[1:])
    assert [results[0], *results[6:]] == alone
    for one, (_, k), result, plain in zip(scored, wanted, results[1:6], expected, strict=True):
        check(folder, one.prompt_ids, result.prompt_logprobs, k)
        assert result.token_ids == plain.token_ids
    assert max(narrow) <= 16
    assert sum(narrow) == sum(length - 1 for length, _ in wanted), "each token once"


@pytest.mark.parametrize("length", [1, 60])
def test_without_output_the_prompt_is_computed_all_the_same(
    driver: Driver, folder: Path, length: int
) -> None:
    ids = prompt(length)
    result = driver.run_one(request("a", ids, max_tokens=0, prompt_logprobs=3))
    assert (result.token_ids, result.finish_reason) == ([], "length")
    check(folder, ids, result.prompt_logprobs, 3)
    assert driver.engine.stats().running == 0


def test_they_come_once_with_the_first_token(driver: Driver, folder: Path) -> None:
    """Also of a sequence that is computed again, as one that gave way is, and after a step that failed."""
    forward, failures = ModelRunner.forward, []

    def failing(self: ModelRunner, batch: list[Sequence], *args: Any) -> Any:
        result = forward(self, batch, *args)
        if len(batch) > 1 and len(failures) < 3:
            failures.append(True)
            raise RuntimeError("after the scores were taken")
        return result

    ids = prompt(90)
    two = [request(f"{i}", ids, max_tokens=5, ignore_eos=True, prompt_logprobs=1) for i in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "forward", failing)
        results = driver.run(*two)
    assert failures
    for result in results:
        assert result.prompt_logprobs_came == 1
        check(folder, ids, result.prompt_logprobs, 1)
