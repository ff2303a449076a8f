"""What every engine promises, on each that is installed; `test_engine_resume` has the rest of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmboost_worker.engine.interface import SequenceRequest
from tests.unit.engine_kinds import CONFIG, ENGINES, OPTIONS, driving_kind
from tests.unit.engine_models import EOS, LONG, PAD, VOCAB, Driver, prompt, request, save_model

PROMPT = prompt(20)


@pytest.fixture(scope="module", params=ENGINES)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    if request.param == "vllm":
        yield request.getfixturevalue("vllm_driver")
        return
    with driving_kind(request.param, tmp_path_factory.mktemp(request.param)) as driver:
        yield driver


def ask(id: str, **options: Any) -> SequenceRequest:
    return request(id, PROMPT, **{"max_tokens": 12, **options})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same model, by transformers."""
    folder: Path = save_model(CONFIG, tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_greedy_tokens_are_those_of_generate(driver: Driver, model: Any) -> None:
    """Prompts of one token, of several steps, and at the edges of blocks; all at once."""
    prompts = [prompt(length) for length in (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200)]
    results = driver.run(*(request(f"{i}", ids, max_tokens=12) for i, ids in enumerate(prompts)))
    for ids, result in zip(prompts, results, strict=True):
        with torch.inference_mode():
            whole = model.generate(
                torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=PAD, eos_token_id=EOS
            )
        assert result.token_ids == whole[0, len(ids) :].tolist()


def test_logprobs_are_of_the_models_distribution(driver: Driver, model: Any) -> None:
    """Before temperature, penalties and filters, for a token that was drawn with all of them."""
    shaped = {"temperature": 2.0, "seed": 5, "top_k": 50, "repetition_penalty": 1.5, "logit_bias": {7: 3.0}}
    result = driver.run_one(ask("shaped", top_logprobs=20, ignore_eos=True, **shaped))
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + result.token_ids])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1)
    for token, reported, row in zip(result.token_ids, result.logprobs, expected, strict=True):
        assert reported.logprob == pytest.approx(row[token].item(), abs=1e-4)
        best = row.topk(20)
        assert [id for id, _ in reported.top] == best.indices.tolist()
        assert [each for _, each in reported.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("wanted", [0, 1, 3])
def test_as_many_top_logprobs_as_asked_for(driver: Driver, wanted: int) -> None:
    """Beside a sequence that asks for more and one that asks for none."""
    asked = ask("asked", top_logprobs=wanted, ignore_eos=True, temperature=1.0, seed=3)
    result, _, none = driver.run(asked, ask("more", top_logprobs=20), ask("none"))
    assert [len(each.top) for each in result.logprobs] == [wanted] * 12
    assert not none.logprobs


def test_more_sequences_than_slots_each_get_what_they_get_alone(driver: Driver) -> None:
    options: list[dict[str, Any]] = [
        {"temperature": float(i % 3), "seed": i, "top_p": 1 - 0.1 * (i % 4), "max_tokens": 5 + i % 7}
        for i in range(30)
    ]
    together = driver.run(*(ask(f"{i}", **each) for i, each in enumerate(options)))
    assert len(options) > OPTIONS["max_num_seqs"]
    for i, each in list(enumerate(options))[::7]:
        assert driver.run_one(ask("alone", **each)) == together[i]


def test_a_sequence_joins_while_others_run_and_leaves_before_them(driver: Driver) -> None:
    alone = driver.run_one(ask("alone", ignore_eos=True)).token_ids
    driver.engine.add([ask("long", **LONG)])
    driver.wait(lambda: driver.tokens("long"))
    assert driver.run_one(ask("short", ignore_eos=True)).token_ids == alone
    assert not driver.finished("long")
    driver.wait(lambda: driver.finished("long"))
    assert driver.tokens("long")[:12] == alone


def test_who_is_cancelled_falls_silent_and_frees_its_slot(driver: Driver) -> None:
    """Ten slots' worth of sequences that nobody waits for are gone before one that needs a slot."""
    ids = [f"cancelled-{i}" for i in range(OPTIONS["max_num_seqs"])]
    driver.engine.add([ask(id, **LONG) for id in ids])
    driver.wait(lambda: all(driver.tokens(id) for id in ids))
    driver.engine.add([ask("waiting")])
    driver.engine.cancel([*ids, "unknown"])
    driver.wait(lambda: driver.finished("waiting"))
    driver.wait_until(lambda: driver.engine.stats().running == 0)
    assert not any(driver.finished(id) for id in ids)
    heard = [len(driver.tokens(id)) for id in ids]
    driver.run_one(ask("after"))
    assert [len(driver.tokens(id)) for id in ids] == heard


def test_a_cancelled_id_can_be_used_again_at_once(driver: Driver) -> None:
    alone = driver.run_one(ask("alone")).token_ids
    driver.engine.add([ask("again", **LONG)])
    driver.wait(lambda: driver.tokens("again"))
    driver.engine.cancel(["again"])
    assert driver.run_one(ask("again")).token_ids == alone


def test_an_id_in_use_is_refused(driver: Driver) -> None:
    driver.engine.add([ask("twin", **LONG)])
    with pytest.raises(ValueError, match="twin"):
        driver.engine.add([ask("twin")])
    driver.engine.cancel(["twin"])


BAD: dict[str, dict[str, Any]] = {
    "outside the vocabulary": {"prompt_ids": [1, VOCAB]},
    "id -1 of prompt": {"prompt_ids": [1, -1]},
    "id 300 of output": {"prompt_ids": [1], "output_ids": [VOCAB]},
    "logit_bias": {"prompt_ids": [1], "logit_bias": {VOCAB: 1.0}},
    "more than the context of 512": {"prompt_ids": [1] * 500, "max_tokens": 13},
    "is empty": {"prompt_ids": []},
    "are infinite": {"prompt_ids": [5], "logit_bias": {9: float("inf")}},
}


def test_bad_requests_fail_alone_each_with_its_reason(driver: Driver) -> None:
    """In one batch with sound ones, which get what they get without them."""
    alone = driver.run_one(ask("alone")).token_ids
    bad = [request(f"bad {reason}", **options) for reason, options in BAD.items()]
    good = [ask(f"good-{i}") for i in range(4)]
    results = driver.run(*good[:2], *bad, *good[2:])
    assert [result.token_ids for result in (*results[:2], *results[-2:])] == [alone] * 4
    for one, result in zip(bad, results[2:-2], strict=True):
        assert (result.finish_reason, result.token_ids) == ("error", [])
        assert one.id.removeprefix("bad ") in (result.error or "")
    driver.wait_until(lambda: driver.engine.stats().running == driver.engine.stats().waiting == 0)


def test_counters_add_up(driver: Driver) -> None:
    before = driver.engine.stats()
    driver.run(*(request(f"{i}", [5 + i, *PROMPT], max_tokens=10, ignore_eos=True) for i in range(6)))
    stats = driver.engine.stats()
    assert stats.output_tokens - before.output_tokens == 60
    assert stats.prompt_tokens - before.prompt_tokens == 6 * 21
    assert 10 <= stats.steps - before.steps <= 60
    assert (stats.running, stats.waiting) == (0, 0)
