"""A whole answer, gathered from the entries of its streams."""

from collections.abc import Iterable, Mapping

from llmboost.entries import Delta, ReadEntry, Terminal, Usage
from llmboost_api import errors
from llmboost_api.protocol.form import Form
from llmboost_api.protocol.shape import Choice, encode_json


class Answer:
    """What the jobs of one completion have said so far; `encode` writes it down when all have ended."""

    def __init__(self, form: Form, completion_id: str) -> None:
        self._form = form
        self._id = completion_id
        self._choices = [Choice() for _ in range(form.n * form.jobs)]
        self._usage = Usage(0, 0)
        self._ended_at: float | None = None
        self._open_jobs = form.jobs

    @property
    def ended(self) -> bool:
        """Every job has been sealed."""
        return self._open_jobs == 0

    @property
    def usage(self) -> Usage:
        """Of the jobs that have ended."""
        return self._usage

    def take(self, job: int, entries: Iterable[ReadEntry]) -> None:
        """The next entries of one job's stream.

        Raises:
            ApiError: the answer is an error.
        """
        for _, entry in entries:
            if isinstance(entry, Delta):
                for delta in entry.choices:
                    self._choices[job * self._form.n + delta.index].add(delta)
            elif isinstance(entry, Terminal):
                if entry.error is not None:
                    raise errors.from_stream(entry.error)
                self._usage = add_usage(self._usage, entry.usage)
                self._ended_at = entry.at
                self._open_jobs -= 1

    def encode(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """The answer as JSON, in its endpoint's form; a stored completion with its metadata."""
        whole = self._form.whole(self._id, self._choices, self._usage, self._ended_at)
        return whole if metadata is None else b'%b,"metadata":%b}' % (whole[:-1], encode_json(metadata))


def add_usage(one: Usage, other: Usage | None) -> Usage:
    """The usage of two jobs together."""
    if other is None:
        return one
    return Usage(
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        one.cached_tokens + other.cached_tokens,
    )
