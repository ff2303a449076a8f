"""The SDK with processes of its own, and stand-ins for the workers: what it starts, and what it leaves."""

import signal

import pytest

from tests.integration.sdk.program import program


def test_a_worker_that_cannot_start_raises_its_reason() -> None:
    with program("""
        from llmboost import LLMBoost
        LLMBoost("unknown").start()
        """) as command:
        assert command.wait() == 1
        assert (
            command.err[-1].startswith("llmboost.sdk.outputs.LLMBoostError: ")
            or "LLMBoostError" in command.log
        )
        assert "there is no model 'unknown'" in command.log
        assert command.family() == []


@pytest.mark.parametrize("ending", ["", "llm.stop()", "raise SystemExit(3)"])
def test_the_end_of_the_program_leaves_no_process(ending: str) -> None:
    """Even if it forgets to stop."""
    with program(f"""
        from llmboost import LLMBoost
        llm = LLMBoost("any", dp=2, device="cpu")
        llm.start()
        print("ready", flush=True)
        {ending}
        """) as command:
        command.wait_for_line("ready")
        assert command.wait() == (3 if "SystemExit" in ending else 0)
        assert command.family() == []
        assert "Traceback" not in command.log


@pytest.mark.parametrize("when", ["starting", "ready"])
def test_ctrl_c_leaves_no_process(when: str) -> None:
    """While it starts, and while it waits for an output."""
    with program("""
        from llmboost import LLMBoost
        with LLMBoost("any") as llm:
            llm.issues_inputs("a")
            print("ready", flush=True)
            llm.get_output()
        """) as command:
        command.wait_for_line(when, among="err" if when == "starting" else "out")
        command.signal(signal.SIGINT)
        command.wait()
        assert "KeyboardInterrupt" in command.err[-1]
        assert command.family() == []


def test_workers_that_die_for_good_end_the_wait() -> None:
    """What can't be answered any more is an error, not a wait."""
    with program("""
        from llmboost import LLMBoost, processes
        processes._MAX_DEATHS = 1
        with LLMBoost("any") as llm:
            llm.issues_inputs("a")
            print("ready", flush=True)
            try:
                llm.get_output()
            finally:
                try:
                    llm.apply_format([{"role": "user", "content": "a"}])
                except Exception as error:
                    print(error, flush=True)
        """) as command:
        command.wait_for_line("ready")
        command.member("worker").kill()
        assert command.wait() == 1
        assert "LLMBoostError: worker-0 was ended by SIGKILL" in command.log
        assert "worker-0" in command.out[-1]
        assert command.family() == []


def test_importing_is_cheap_and_the_sdk_needs_neither_side() -> None:
    """`import llmboost` loads no SDK, and the SDK neither pod nor worker nor torch."""
    with program("""
        import sys
        import llmboost
        assert not [name for name in sys.modules if name.startswith(("llmboost.", "redis", "pydantic"))]
        from llmboost import LLMBoost
        heavy = {"llmboost_api", "llmboost_worker", "torch", "transformers", "fastapi", "uvicorn"}
        assert not heavy & sys.modules.keys()
        """) as command:
        assert command.wait() == 0, command.log
