"""A request that its model can't answer is refused before anything of it runs."""

from concurrent.futures import Future
from typing import Any

import pytest

from llmboost.jobs import Grammar
from llmboost_worker import checks
from llmboost_worker.engine.interface import GrammarError
from tests.engines import ScriptedEngine
from tests.jobs import make_job

JOB = make_job(grammar=Grammar("regex", "a+", "guided_regex"))


class CompilingEngine(ScriptedEngine):
    """Compiles when it is told to."""

    def __init__(self) -> None:
        super().__init__([1])
        self.future: Future[Any] = Future()

    def compile(self, grammar: Grammar) -> "Future[Any]":
        return self.future


async def test_a_request_without_a_grammar_needs_none() -> None:
    assert await checks.compiled(make_job(), ScriptedEngine([1])) is None


async def test_what_the_engine_makes_of_a_grammar_is_passed_on() -> None:
    engine = CompilingEngine()
    engine.future.set_result("compiled")
    assert await checks.compiled(JOB, engine) == "compiled"


async def test_an_engine_that_holds_to_no_grammar_refuses_it_by_its_field() -> None:
    with pytest.raises(checks.Refused) as refused:
        await checks.compiled(JOB, ScriptedEngine([1]))
    assert (refused.value.error.status, refused.value.error.param) == (400, "guided_regex")
    assert refused.value.error.message.startswith("'guided_regex' can't be met")


async def test_a_grammar_that_takes_too_long_is_refused_and_others_go_on_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = CompilingEngine()
    monkeypatch.setattr(checks, "COMPILE_WITHIN_S", 0.01)
    with pytest.raises(checks.Refused, match="simpler") as refused:
        await checks.compiled(JOB, engine)
    assert refused.value.error.status == 400
    assert not engine.future.cancelled()
    engine.future.set_exception(GrammarError("is late."))
    with pytest.raises(checks.Refused, match="'guided_regex' is late"):
        await checks.compiled(JOB, engine)
