"""Batches, seen by the official client: made from a file, run line by line, and written into files."""

from .api_pod import MODEL, RunningPod
from .batch_inputs import begin, lines, outcome


async def test_every_line_is_answered(pod: RunningPod) -> None:
    """Each line has one row in the output file, with the answer that the endpoint gives."""
    batch = await begin(pod.openai, lines(20), metadata={"what": "test"})
    assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", "/v1/chat/completions")
    assert batch.expires_at is not None
    assert batch.expires_at - batch.created_at == 24 * 3600
    found = await outcome(pod.openai, batch.id)
    assert found.batch.status == "completed"
    assert found.counts == (20, 20, 0)
    assert found.output.keys() == {f"line-{number}" for number in range(1, 21)}
    assert found.batch.error_file_id is None
    assert found.batch.metadata == {"what": "test"}
    assert found.batch.model == MODEL
    assert found.batch.usage is not None
    assert found.batch.usage.total_tokens == 20 * 10
    row = found.output["line-7"]
    assert list(row) == ["id", "custom_id", "response", "error"]
    assert row["id"].startswith("batch_req_")
    assert row["error"] is None
    assert row["response"]["status_code"] == 200
    body = row["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["id"] == row["response"]["request_id"]
    assert found.text("line-7") == "Once upon a time."
    times = found.batch
    assert times.in_progress_at and times.finalizing_at and times.completed_at
    assert times.failed_at is times.cancelled_at is times.expired_at is None
