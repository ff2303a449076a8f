"""The SDK on the demo model, with Redis and workers of its own and on a running system. The documentation's
examples are in `test_seed_examples`."""

import sys
import textwrap

from tests.commands import Command

PROGRAM = textwrap.dedent("""
    from llmboost import LLMBoost

    CHATS = [[{"role": "user", "content": text}] for text in ("Hello!", "What is 2 + 3?", "Who are you?")]

    def answers(llm):
        texts, unfinished = {}, 2 * len(CHATS)
        while unfinished:
            for output in llm.get_output(timeout=60):
                assert output["error"] is None, output
                texts[output["id"]] = texts.get(output["id"], "") + output["val"]
                unfinished -= output["finished"]
        return [texts[number] for number in range(2 * len(CHATS))]

    if __name__ == "__main__":
        with LLMBoost(streaming=True, temperature=0, max_tokens=40, dp=2, threads=1) as llm:
            llm.issues_inputs([llm.apply_format(chat) for chat in CHATS])
            llm.issues_inputs(CHATS)
            streamed = answers(llm)
            print("served", flush=True)
            redis_url = llm._running._processes.redis_url
            with LLMBoost(redis_url=redis_url, temperature=0, max_tokens=40) as other:
                other.issues_inputs([*CHATS, *CHATS])
                assert answers(other) == streamed
        assert streamed[: len(CHATS)] == streamed[len(CHATS):]
        assert all(streamed) and len(set(streamed)) == len(CHATS)
        print("done", flush=True)
""")


def test_every_way_to_ask_gives_the_same_answer() -> None:
    """A chat formatted by the caller and one formatted by the worker, streamed and whole, on processes of its
    own and on a running system: greedily, all the same. Then nothing of it is left."""
    with Command([sys.executable, "-c", PROGRAM]) as command:
        command.wait_for_line("served", within=120)
        assert command.wait() == 0, command.log
        assert command.out[-1] == "done"
        assert command.family() == []
