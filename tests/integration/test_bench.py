"""`llmboost bench` against servers that answer well, badly, or in their own way."""

import asyncio
import errno
import itertools
import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from llmboost.cli import commands
from llmboost.cli.bench import report, run
from llmboost.cli.bench.options import parse
from llmboost.cli.bench.run import measure
from llmboost.cli.bench.target import TargetError
from llmboost.jobs import GenerationJob
from tests.commands import llmboost, wait_until
from tests.integration.api_pod import WORDS, RunningPod, ScriptedWorker, ends, fails, says
from tests.integration.scripted_server import Exchange, ScriptedServer, good


def measured(server: ScriptedServer, line: str = "") -> dict[str, Any]:
    """The report."""
    defaults = "--num-requests 6 --prompt-tokens 20 --output-tokens 9 --seed 1"
    return measure(parse([server.url, *shlex.split(defaults), *shlex.split(line)], {}))


def point(server: ScriptedServer, line: str = "") -> dict[str, Any]:
    (found,) = measured(server, line)["points"]
    return found


async def test_a_pod_of_ours_takes_token_ids_and_its_failures_are_counted(
    pod: RunningPod, worker: ScriptedWorker
) -> None:
    numbers = itertools.count()

    def script(job: GenerationJob) -> list[Any]:
        ids = job.prompt.token_ids or []
        if len(ids) == 20 and next(numbers) % 3 == 0:
            return [*says(WORDS[:2], reason=None), fails("It broke.")]
        return [*says(WORDS), ends(prompt_tokens=len(ids), cached=4 if len(ids) == 20 else 0)]

    worker.script = script
    line = "--num-requests 9 --prompt-tokens 20 --output-tokens 5 --concurrency 3 --warmup 0"
    report = await asyncio.to_thread(measure, parse([pod.url, *shlex.split(line)], {}))
    (found,) = report["points"]
    assert report["workload"]["prompts_are"] == "token ids"
    assert not report["notes"]
    assert found["requests"] == {"ok": 6, "failed": 3}
    assert found["errors"] == [{"kind": "error in the stream", "count": 3, "message": "It broke."}]
    assert found["output_tokens"] == 6 * len(WORDS)
    assert found["mean_prompt_tokens"] == 20
    assert found["cached_tokens"] == 6 * 4


def test_tokens_are_the_servers_own_count() -> None:
    with ScriptedServer() as server:
        found = point(server, "--concurrency 3")
    assert found["requests"] == {"ok": 6, "failed": 0}
    assert found["output_tokens"] == 6 * 9
    assert found["mean_prompt_tokens"] == 20
    assert found["counted_by"] == "usage"


def test_a_generator_that_is_busy_itself_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer() as server:
        monkeypatch.setattr(run, "BUSY", 0.0)
        assert any("of a core" in line for line in point(server)["warnings"])
        monkeypatch.setattr(run, "BUSY", 2.0)
        assert not point(server)["warnings"]


def test_prompts_are_token_ids_where_they_are_taken() -> None:
    with ScriptedServer() as server:
        report = measured(server)
    assert report["workload"]["prompts_are"] == "token ids"
    assert all(len(body["prompt"]) == 20 for body in server.measured)


def test_there_is_a_connection_for_each_request_at_a_time_and_no_more() -> None:
    with ScriptedServer() as server:
        measured(server, "--concurrency 3 --num-requests 30")
        assert server.connections == 3


@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_bytes_may_come_in_any_portions(size: int) -> None:
    """Also within the chunks of HTTP itself."""

    async def dribble(exchange: Exchange) -> None:
        whole = bytearray()

        async def keep(data: str | bytes) -> None:
            whole.extend(data.encode() if isinstance(data, str) else data)

        write, exchange.write = exchange.write, keep  # type: ignore[method-assign]
        await good(exchange)
        for at in range(0, len(whole), size):
            await write(bytes(whole[at : at + size]))

    with ScriptedServer(dribble) as server:
        found = point(server, "--num-requests 2")
    assert found["requests"]["ok"] == 2
    assert found["output_tokens"] == 18
    assert found["counted_by"] == "usage"


def test_a_server_without_completions_is_asked_for_chats_of_the_right_length() -> None:
    async def answer(exchange: Exchange) -> None:
        if exchange.path.endswith("/chat/completions"):
            await good(exchange)
        else:
            await exchange.reply(404, {"error": {"message": "no such path"}})

    with ScriptedServer(answer) as server:
        report = measured(server, "--prompt-tokens 101")
    assert report["endpoint"] == "chat"
    assert report["points"][0]["mean_prompt_tokens"] == 101


def test_a_server_that_takes_text_alone_gets_texts_of_the_right_length() -> None:
    async def answer(exchange: Exchange) -> None:
        if isinstance(exchange.body["prompt"], list):
            await exchange.reply(422, {"detail": "prompt must be a string."})
        else:
            await good(exchange)

    with ScriptedServer(answer) as server:
        report = measured(server, "--prompt-tokens 50 --shared-prefix-tokens 30")
    assert report["workload"]["prompts_are"] == "text"
    assert report["points"][0]["mean_prompt_tokens"] == 80


def test_fields_that_are_refused_by_name_are_left_out_and_that_is_said() -> None:
    async def answer(exchange: Exchange) -> None:
        body = exchange.body
        if "ignore_eos" in body:
            await exchange.reply(422, {"detail": "Unexpected fields in the request: {'ignore_eos'}"})
        elif "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            await exchange.reply(400, {"error": {"message": message}})
        else:
            exchange.body = {**body, "max_tokens": body["max_completion_tokens"]}
            await good(exchange)

    with ScriptedServer(answer) as server:
        report = measured(server, "--endpoint chat")
    assert report["points"][0]["output_tokens"] == 54
    assert report["workload"]["ignore_eos"] is False
    assert any("does not take ignore_eos" in note for note in report["notes"])


def test_chunks_are_counted_where_a_server_sends_no_usage_and_that_is_said() -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.head()
        for _ in range(4):
            await exchange.chunk("text")
        await exchange.end()

    with ScriptedServer(answer) as server:
        report = measured(server, "--endpoint chat")
    assert report["points"][0]["output_tokens"] == 24
    assert any("tokens are counted as chunks" in line for line in report["points"][0]["warnings"])
    assert any("a word is taken for one" in note for note in report["notes"])


def test_an_end_without_done_is_one_if_there_was_a_reason() -> None:
    def ending(finish: str | None) -> Any:
        async def answer(exchange: Exchange) -> None:
            await exchange.head()
            await exchange.chunk("text", finish=None if exchange.body["max_tokens"] > 1 else "length")
            await exchange.chunk("text", finish=finish if exchange.body["max_tokens"] > 1 else "length")
            await exchange.end((20, 9), done=False)

        return answer

    with ScriptedServer(ending("length")) as server:
        assert point(server)["requests"] == {"ok": 6, "failed": 0}
    with ScriptedServer(ending(None)) as server:
        found = point(server)
    assert found["requests"] == {"ok": 0, "failed": 6}
    assert found["errors"][0]["kind"] == "ended early"


def test_every_kind_of_failure_is_counted_with_an_example() -> None:
    """A server that dies in the middle of a measurement is among them."""
    seen = 0

    async def answer(exchange: Exchange) -> None:
        nonlocal seen
        if exchange.body["max_tokens"] == 1:
            return await good(exchange)
        seen += 1
        match seen:
            case 1:
                return await good(exchange)
            case 2:
                return await exchange.reply(503, {"error": {"message": "no worker"}})
            case 3:
                await exchange.head()
                await exchange.chunk("text")
                return exchange.cut()
            case 4:
                await exchange.head()
                await exchange.chunk("text")
                await exchange.send(b'data: {"error": {"message": "out of memory"}}\n\n')
                return await exchange.end(done=False)
            case 5:
                return await exchange.reply(200, {"choices": [{"text": "all at once"}]})
            case _:
                return exchange.cut()

    with ScriptedServer(answer) as server:
        found = point(server, "--warmup 0")
    assert found["requests"] == {"ok": 1, "failed": 5}
    assert found["output_tokens"] == 9
    kinds = {error["kind"]: error for error in found["errors"]}
    assert kinds["status 503"]["message"] == "no worker"
    assert kinds["connection lost"]["count"] == 2
    assert kinds["error in the stream"]["message"] == "out of memory"
    assert "application/json" in kinds["no stream"]["message"]


def test_what_takes_too_long_is_a_failure() -> None:
    async def answer(exchange: Exchange) -> None:
        if exchange.body["max_tokens"] == 1:
            return await good(exchange)
        await exchange.head()
        await exchange.chunk("text")
        return None  # and never ends

    with ScriptedServer(answer) as server:
        found = point(server, "--warmup 0 --timeout 0.2 --num-requests 2 --concurrency 2")
    assert found["requests"] == {"ok": 0, "failed": 2}
    assert found["errors"][0]["kind"] == "timeout"


def test_a_connection_that_was_closed_while_it_lay_idle_costs_nothing() -> None:
    async def answer(exchange: Exchange) -> None:
        await good(exchange)
        exchange.writer.close()

    with ScriptedServer(answer) as server:
        assert point(server, "--num-requests 12 --concurrency 2")["requests"] == {"ok": 12, "failed": 0}


def test_the_warm_up_is_of_other_prompts_and_short() -> None:
    with ScriptedServer() as server:
        measured(server, "--output-tokens 40 --warmup 5")
    warm = [body for body in server.measured if body["max_tokens"] == 16]
    assert len(warm) == 5
    assert len({str(body["prompt"]) for body in server.measured}) == len(server.measured) == 11


def test_an_answer_may_end_with_its_connection() -> None:
    """As those of HTTP/1.0 do."""

    async def answer(exchange: Exchange) -> None:
        async def send(data: bytes) -> None:
            await exchange.write(data)

        exchange.send = send  # type: ignore[method-assign]
        await exchange.write("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        await exchange.chunk("text", finish="length")
        await exchange.send(b'data: {"choices":[],"usage":{"prompt_tokens":20,"completion_tokens":1}}\n\n')
        exchange.writer.close()

    with ScriptedServer(answer) as server:
        assert point(server)["requests"] == {"ok": 6, "failed": 0}


def test_a_server_without_a_list_of_models_is_told_one(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(models={"error": "no such thing"}, models_status=500) as server:
        assert measured(server, "--model big")["model"] == "big"
        assert commands.run(["bench", server.url]) == 1
        assert "answered with status 500" in capsys.readouterr().err
    with ScriptedServer(models={"data": []}) as server:
        assert commands.run(["bench", server.url]) == 1
        assert "lists no model: wait until one is loaded" in capsys.readouterr().err


def test_a_key_may_be_needed_for_the_list_of_models() -> None:
    with (
        ScriptedServer(models={"error": {"message": "who are you?"}}, models_status=401) as server,
        pytest.raises(TargetError, match=r"--api-key .*a key is needed: .*who are you"),
    ):
        measured(server)


def test_nobody_waits_for_a_request_that_comes_after_the_end() -> None:
    """At this rate the second one would be sent after minutes."""
    with ScriptedServer() as server:
        options = "--seed 1 --output-tokens 9 --prompt-tokens 20 --duration 0.1 --request-rate 0.001"
        (found,) = measure(parse([server.url, *shlex.split(options)], {}))["points"]
    assert found["requests"]["ok"] == 1
    assert found["duration_s"] < 5


def test_a_sweep_has_a_point_for_each_load() -> None:
    with ScriptedServer() as server:
        points = measured(server, "--concurrency 1,2,4")["points"]
        assert [found["concurrency"] for found in points] == [1, 2, 4]
        (found,) = measured(server, "--request-rate 400")["points"]
    assert found["load"] == "400/s"
    assert found["requests"]["ok"] == 6


def test_a_duration_ends_the_sending_and_not_the_answers() -> None:
    with ScriptedServer() as server:
        options = "--seed 1 --output-tokens 9 --prompt-tokens 20 --duration 0.2 --concurrency 2"
        (found,) = measure(parse([server.url, *shlex.split(options)], {}))["points"]
    assert found["requests"]["ok"] > 2
    assert found["requests"]["failed"] == 0
    assert found["duration_s"] == pytest.approx(0.2, abs=0.15)


def test_a_key_is_sent_and_its_lack_is_said() -> None:
    async def answer(exchange: Exchange) -> None:
        if exchange.headers.get("authorization") == "bearer secret":
            await good(exchange)
        else:
            await exchange.reply(401, {"error": {"message": "who are you?"}})

    with ScriptedServer(answer) as server:
        assert point(server, "--api-key SECRET")["requests"]["ok"] == 6
        with pytest.raises(TargetError, match=r"--api-key .*a key is needed: .*who are you"):
            measured(server)
        with pytest.raises(TargetError, match="the key was refused"):
            measured(server, "--api-key other")


def test_what_a_model_cant_take_is_said_before_it_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer() as server:
        code = commands.run(["bench", server.url, "--prompt-tokens", "4090", "--output-tokens", "10"])
    assert code == 2
    assert "tiny takes 4096 tokens, prompt and answer together" in capsys.readouterr().err
    assert not server.measured


def test_figures_are_shown_kept_drawn_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split("--num-requests 4 --prompt-tokens 8 --output-tokens 4 --seed 1")
    with ScriptedServer() as server:
        one = ["bench", server.url, *words, "--json", "one.json", "--plot", "one.png", "--slo", "ttft:10000"]
        assert commands.run(one) == 0
        shown = capsys.readouterr().out
        assert "time to first token" in shown
        assert "4 ok, 0 failed" in shown
        assert "4 requests within ttft 10000 ms" in shown
        sweep = ["--concurrency", "1,2", "--label", "new", "--plot", "two.svg", "--compare", "one.json"]
        assert commands.run(["bench", server.url, *words, *sweep]) == 0
        shown = capsys.readouterr().out
        assert shown.count("new") >= 2
        assert "ratio" in shown
        assert commands.run(["bench", server.url, *words, "--json", "-"]) == 0
        out = capsys.readouterr().out
    assert json.loads(out)["points"][0]["requests"]["ok"] == 4
    assert Path("one.png").read_bytes().startswith(b"\x89PNG")
    assert "Time to first token" in Path("two.svg").read_text()


def test_only_failures_are_exit_code_1_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    async def answer(exchange: Exchange) -> None:
        if exchange.body["max_tokens"] == 1:
            await good(exchange)
        else:
            await exchange.reply(500, {"error": {"message": "broken"}})

    with ScriptedServer(answer) as server:
        assert commands.run(["bench", server.url, "--num-requests", "3"]) == 1
    out, err = capsys.readouterr()
    assert "3 failed, status 500: broken" in out
    assert "Traceback" not in out + err


def test_figures_that_cant_be_kept_are_shown_and_the_exit_code_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report, "write", full)
    file = str(tmp_path / "one.json")
    with ScriptedServer() as server:
        words = ["--num-requests", "2", "--prompt-tokens", "4", "--output-tokens", "3", "--warmup", "0"]
        assert commands.run(["bench", server.url, *words, "--json", file]) == 1
    out, err = capsys.readouterr()
    assert "2 ok, 0 failed" in out
    assert f"--json {file!r} can't be written: No space left" in err


def test_ctrl_c_shows_what_there_is() -> None:
    async def answer(exchange: Exchange) -> None:
        if len(server.measured) <= 3:
            await good(exchange)  # the others are never answered

    server = ScriptedServer(answer)
    with server, llmboost("bench", server.url, "--warmup", "0", "--concurrency", "2") as command:
        wait_until(lambda: len(server.measured) == 5, what="requests that are under way")
        command.signal(signal.SIGINT)
        assert command.wait() == 130
    assert any("3 ok, 0 failed" in line for line in command.out), command.log
    assert any("interrupted" in line for line in command.out)
    assert not any("Traceback" in line for line in command.err), command.log
