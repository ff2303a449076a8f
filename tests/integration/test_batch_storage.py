"""Batches whose files are on the local disk, or in a bucket."""

import pytest

from .api_pod import ScriptedWorker, chat, serving, settings_for
from .batch_inputs import begin, lines, outcome
from .storages import files_url, left_in, s3_endpoint

__all__ = ["files_url", "s3_endpoint"]

LINES = 600
"""More than go into one part."""


@pytest.mark.timeout(120)
async def test_on_any_storage(redis_url: str, worker: ScriptedWorker, files_url: str) -> None:
    """The files are put together from many parts, of which nothing is left; any pod has them."""
    settings = settings_for(redis_url, files_url=files_url)
    async with serving(settings) as one, serving(settings) as two:
        batch = await begin(
            one.openai, lines(LINES, lambda number: chat(temperature=9 if number % 3 == 0 else 1))
        )
        found = await outcome(two.openai, batch.id)
        assert found.counts == (LINES, 2 * LINES // 3, LINES // 3)
        files = {found.batch.input_file_id, found.batch.output_file_id, found.batch.error_file_id}
    names = {name.rpartition("/")[2] for name in left_in(files_url)}
    assert names - {"batches"} == files
