"""The engine draws only what a sequence's grammar allows, whatever else is asked for, whoever else runs."""

import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from llmboost.jobs import Grammar
from llmboost_worker.engine.grammar import Matcher
from llmboost_worker.engine.interface import SequenceRequest
from llmboost_worker.engine.transformers import masks
from tests.unit.engine_kinds import ENGINES, driving_vllm
from tests.unit.engine_models import COMMON, Driver, driving, prompt, request, save_model
from tests.unit.grammars import PADDING, of_choices, of_schema, said, tokenizer_of
from tests.unit.text_tokenizers import token_id

TOKENIZER = tokenizer_of("byte_level")
END = token_id(TOKENIZER, "<|end|>")
SIZE = TOKENIZER.vocab_size + PADDING
SCHEMA = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 8}]},
    },
    "required": ["count", "tags", "note"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": of_schema(SCHEMA),
    "regex": Grammar("regex", r"[a-z]{2,5}-\d{3}( [A-Z]{1,9})?"),
    "choice": of_choices("yes", "no", "maybe so"),
}
PENALTIES = {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 5.0}


@pytest.fixture(scope="module", params=ENGINES)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    config = LlamaConfig(**{**COMMON, "vocab_size": SIZE, "eos_token_id": END, "head_dim": 32})
    folder = save_model(config, tmp_path_factory.mktemp("model"))
    drive = driving_vllm if request.param == "vllm" else driving
    with drive(folder, TOKENIZER.token_bytes, max_num_seqs=24) as driver:
        yield driver


def asks(
    driver: Driver, id: str, grammar: Grammar | None, output_ids: list[int] | None = None, **fields: Any
) -> SequenceRequest:
    """Hot, unless told otherwise."""
    fields = {"temperature": 2.0, "max_tokens": 400, "seed": 1, **fields}
    one = request(id, prompt(6), output_ids, grammar=grammar, **fields)
    return dataclasses.replace(one, grammar=driver.engine.compile(grammar).result()) if grammar else one


def is_of(name: str, text: str) -> bool:
    if name == "regex":
        return re.fullmatch(GRAMMARS[name].value, text) is not None
    if name == "choice":
        return text in json.loads(GRAMMARS[name].value)
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


def test_a_mixed_batch_is_held_to_its_grammars_and_leaves_the_others_free(driver: Driver) -> None:
    """Whoever has no grammar says what it says alone, and whoever has one too."""
    free = [asks(driver, f"free {seed}", None, seed=seed, max_tokens=20) for seed in range(6)]
    held = [
        asks(driver, f"{name} {seed}", grammar, seed=seed)
        for name, grammar in GRAMMARS.items()
        for seed in range(2)
    ]
    alone = [driver.run_one(one) for one in free + held]
    together = driver.run(*[one for pair in zip(held, free, strict=True) for one in pair])
    assert {tuple(each.token_ids) for each in together} <= {tuple(each.token_ids) for each in alone}
    for one, result in zip(held, alone[6:], strict=True):
        assert result.finish_reason == "stop"
        assert result.token_ids[-1] == END
        assert is_of(one.id.split()[0], said(result.token_ids))


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_resumed_output_is_the_unbroken_one(driver: Driver, name: str) -> None:
    grammar = GRAMMARS[name]
    whole = driver.run_one(asks(driver, "whole", grammar)).token_ids
    cuts = range(0, len(whole), max(1, len(whole) // 10))
    resumed = driver.run(*[asks(driver, f"from {cut}", grammar, whole[:cut]) for cut in cuts])
    assert [whole[:cut] + each.token_ids for cut, each in zip(cuts, resumed, strict=True)] == [whole] * len(
        cuts
    )


@pytest.mark.parametrize("name", GRAMMARS)
def test_nothing_brings_back_what_a_grammar_forbids(driver: Driver, name: str) -> None:
    """Not a bias for special tokens, for ids without a token and for the end, nor penalties, nor filters."""
    wanted = [*range(5), *range(TOKENIZER.vocab_size, SIZE)]
    for fields in (
        {"logit_bias": dict.fromkeys(wanted, 100.0)},
        {"logit_bias": {END: -100.0}, **PENALTIES},
        {"top_k": 1, "temperature": 1.0},
        {"top_p": 0.01, "min_p": 0.9},
        {"temperature": 0.0},
    ):
        result = driver.run_one(asks(driver, "biased", GRAMMARS[name], **fields))
        assert result.finish_reason == "stop", fields
        assert is_of(name, said(result.token_ids))


def test_min_tokens_and_ignore_eos_hold_the_end_back_only_while_something_else_may_come(
    driver: Driver,
) -> None:
    for fields in ({"min_tokens": 50}, {"ignore_eos": True}, {"min_tokens": 5, "ignore_eos": True}):
        closed = driver.run_one(asks(driver, "closed", Grammar("regex", "[ab]{8}"), **fields))
        assert closed.finish_reason == "stop"
        assert re.fullmatch("[ab]{8}", said(closed.token_ids))
        open_ = driver.run_one(asks(driver, "open", Grammar("regex", "[ab]*"), max_tokens=50, **fields))
        assert (open_.finish_reason, len(open_.token_ids)) == ("length", 50)


def test_max_tokens_ends_an_answer_in_the_middle(driver: Driver) -> None:
    result = driver.run_one(asks(driver, "short", GRAMMARS["schema"], max_tokens=3))
    assert (result.finish_reason, len(result.token_ids)) == ("length", 3)


def test_stop_tokens_held_back_where_nothing_else_may_come_are_an_error_that_says_so(driver: Driver) -> None:
    a = TOKENIZER.token_bytes().index(b"a")
    impossible = {"stop_token_ids": (a,), "min_tokens": 3}
    result = driver.run_one(asks(driver, "stuck", Grammar("regex", "a{3}"), **impossible))
    assert result.finish_reason == "error"
    assert "min_tokens" in (result.error or "")


def test_what_its_grammar_does_not_take_ends_one_sequence_alone(driver: Driver) -> None:
    """Which can't come of this engine, but perhaps of a grammar that has grown too complex."""
    x = TOKENIZER.token_bytes().index(b"x")
    *others, result = driver.run(
        asks(driver, "free", None, max_tokens=10),
        asks(driver, "held", GRAMMARS["choice"]),
        asks(driver, "wrong", GRAMMARS["choice"], [x]),
    )
    assert result.finish_reason == "error"
    assert "grammar" in (result.error or "")
    assert [each.finish_reason for each in others] == ["length", "stop"]


@pytest.mark.parametrize("width", [64, 70, 59])
@pytest.mark.parametrize("rows", [(0, 1, 2), (2, 0)])
def test_masks_are_applied_alike_on_a_cpu_and_elsewhere(
    driver: Driver, rows: tuple[int, ...], width: int
) -> None:
    """To the rows that have one, whether logits are as wide as the masks, wider or narrower."""
    matchers = {row: driver.engine.compile(GRAMMARS["choice"]).result().matcher(0, False) for row in rows}
    random = np.random.default_rng(0)
    for matcher in matchers.values():
        matcher.mask = random.integers(-(2**31), 2**31, 2, dtype=np.int32)
    logits = torch.randn(3, width)
    expected = logits.clone()
    for row, matcher in matchers.items():
        for token in range(width):
            if token >= 64 or not int(matcher.mask[token // 32]) >> token % 32 & 1:
                expected[row, token] = -torch.inf
    masks.forbid(logits, matchers)
    assert (logits == expected).all()
    packed = random.integers(0, 256, (5, 8), dtype=np.uint8)
    assert (masks.limits_there(packed, torch.device("cpu")) == masks.limits(packed)).all()


@pytest.mark.parametrize("driver", ["transformers"], indirect=True)
def test_what_may_come_next_is_found_out_beside_the_compute_thread(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once for each token: whoever waits for it finds it done."""
    threads: list[str] = []
    advance = Matcher._advance

    def noted(matcher: Matcher, new: list[int]) -> None:
        threads.append(threading.current_thread().name)
        advance(matcher, new)

    monkeypatch.setattr(Matcher, "_advance", noted)
    result = driver.run_one(asks(driver, "held", GRAMMARS["regex"]))
    assert len(threads) == len(result.token_ids)
    assert all(name.startswith("llmboost-matcher") for name in threads)


def test_logprobs_are_of_the_models_own_distribution(driver: Driver) -> None:
    """As without a grammar: what was forbidden may be the likeliest."""
    free = driver.run_one(asks(driver, "free", None, max_tokens=1, top_logprobs=3))
    held = driver.run_one(asks(driver, "held", GRAMMARS["choice"], max_tokens=1, top_logprobs=3))
    assert held.logprobs[0].top == free.logprobs[0].top


def test_a_grammar_that_was_not_compiled_is_an_error(driver: Driver) -> None:
    result = driver.run_one(request("bare", prompt(3), grammar=GRAMMARS["choice"]))
    assert result.finish_reason == "error"
    assert "compiled" in (result.error or "")
