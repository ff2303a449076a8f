"""A batch's input: what is wrong with a line is told with its number, before any line is run."""

import pytest

from .api_pod import COMPLETIONS, RunningPod, ScriptedWorker, chat, serving, settings_for
from .batch_inputs import begin, ended, line, lines, outcome

BAD_LINES: list[tuple[str, str, str | None]] = [
    ("nonsense", "invalid_json_line", None),
    ("[1]", "invalid_json_line", None),
    ("", "invalid_json_line", None),
    (line("x", chat(), custom_id=None), "missing_required_parameter", "custom_id"),
    (line("x", chat(), custom_id=7), "invalid_custom_id", "custom_id"),
    (line(""), "invalid_custom_id", "custom_id"),
    (line("first"), "duplicate_custom_id", "custom_id"),
    (line("x", method="GET"), "invalid_method", "method"),
    (line("x", method=None), "missing_required_parameter", "method"),
    (line("x", url=COMPLETIONS), "invalid_url", "url"),
    (line("x", body=[1]), "invalid_type", "body"),
    (line("x", priority=1), "unknown_parameter", "priority"),
    (line("x", chat(stream=True)), "unsupported_value", "body.stream"),
    (line("x", chat(model="gpt-x")), "model_not_found", "body.model"),
    (line("x" * 513), "invalid_custom_id", "custom_id"),
    (line("x", chat(user="y" * 3000)), "line_too_long", None),
]


@pytest.mark.parametrize(("bad", "code", "param"), BAD_LINES)
async def test_a_line_that_is_no_request(
    redis_url: str, worker: ScriptedWorker, bad: str, code: str, param: str | None
) -> None:
    """The batch fails before anything is run; its error has the line's number and what is wrong with it."""
    async with serving(settings_for(redis_url, max_request_bytes=2000)) as pod:
        batch = await begin(pod.openai, [line("first"), bad, line("last")])
        found = await outcome(pod.openai, batch.id)
    assert found.batch.status == "failed"
    assert found.batch.failed_at is not None
    assert found.batch.errors is not None
    assert found.batch.errors.object == "list"
    assert found.batch.errors.data is not None
    (error,) = found.batch.errors.data
    assert (error.code, error.line, error.param) == (code, 2, param)
    assert error.message is not None
    assert error.message.startswith("Line 2: ")
    assert worker.jobs == []


async def test_many_bad_lines(pod: RunningPod) -> None:
    """So many are told as help, in the order of the file."""
    content = [line("same") if number % 2 else "nonsense" for number in range(1, 401)]
    batch = await begin(pod.openai, content)
    found = await ended(pod.openai, batch.id)
    assert found.errors is not None
    assert found.errors.data is not None
    numbers = [error.line or 0 for error in found.errors.data]
    assert len(numbers) == 100
    assert numbers == sorted(numbers)
    assert numbers[0] == 2


@pytest.mark.parametrize("content", [b"\n", b"\n \r\n\n", b"\xef\xbb\xbf\n"])
async def test_an_empty_file(pod: RunningPod, content: bytes) -> None:
    """A file without a request fails."""
    batch = await begin(pod.openai, content)
    found = await ended(pod.openai, batch.id)
    assert found.status == "failed"
    assert found.errors is not None
    assert [error.code for error in found.errors.data or []] == ["empty_file"]


async def test_what_editors_do_to_a_file(pod: RunningPod) -> None:
    """A byte order mark, Windows' line breaks, blank lines at the end, or no line break there at all."""
    windows = "\r\n".join(lines(3)).encode()
    for content in (b"\xef\xbb\xbf" + windows + b"\r\n\r\n \n", windows):
        batch = await begin(pod.openai, content)
        assert (await outcome(pod.openai, batch.id)).counts == (3, 3, 0)
