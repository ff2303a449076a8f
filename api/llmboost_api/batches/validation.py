"""A batch's input, looked through before any of it is run: every line must be a request of this batch.

What an endpoint says of a request's body is not looked at here: it is that line's own result.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from llmboost_api.batches.lines import LineRefused, LineRequest, is_blank, read_line
from llmboost_api.batches.pace import Pace
from llmboost_api.batches.record import Problem
from llmboost_api.batches.uniqueness import Uniqueness
from llmboost_api.files.lines import Line
from llmboost_api.protocol.form import Endpoint

MOST_PROBLEMS = 100
"""Told at most."""

CheckModel = Callable[[str], Awaitable[str | None]]
"""Why a model can't be asked for; None if it can."""


@dataclass
class Validated:
    """What there is in a file."""

    total: int = 0
    """Requests: lines up to the last that is not blank."""
    model: str | None = None
    """If all ask for the same."""
    problems: list[Problem] = field(default_factory=list)


async def validate(
    lines: AsyncIterator[Line], endpoint: Endpoint, max_bytes: int, check_model: CheckModel
) -> Validated:
    """Looks at every line, up to `MOST_PROBLEMS` problems, in constant memory.

    Raises:
        StorageError: from the lines.
    """
    with Uniqueness() as names:
        validation = _Validation(endpoint, max_bytes, check_model, names)
        pace = Pace()
        async for line in lines:
            await validation.take(line)
            if validation.full:
                break
            await pace.rest()
        return await validation.finish()


class _Validation:
    def __init__(
        self, endpoint: Endpoint, max_bytes: int, check_model: CheckModel, names: Uniqueness
    ) -> None:
        self._endpoint = endpoint
        self._max_bytes = max_bytes
        self._check_model = check_model
        self._names = names
        self._found = Validated()
        self._models: set[str] = set()
        """Two of them at most: more tell nothing."""
        self._blank: int | None = None
        """The first of the blank lines that have come last."""

    @property
    def full(self) -> bool:
        """No more problems are told."""
        return len(self._found.problems) >= MOST_PROBLEMS

    async def take(self, line: Line) -> None:
        if is_blank(line):
            self._blank = self._blank or line.number
            return
        if self._blank is not None:
            number, self._blank = self._blank, None
            message = f"Line {number}: it is blank. Remove it: only the file's last lines may be blank."
            self._found.problems.append(Problem("invalid_json_line", message, number))
        self._found.total = line.number
        try:
            request = read_line(line, self._endpoint, self._max_bytes)
        except LineRefused as refused:
            self._found.problems.append(refused.problem)
            return
        await self._check(request)

    async def finish(self) -> Validated:
        self._repeated(await self._names.flush())
        found = self._found
        if not found.total:
            found.problems.append(
                Problem("empty_file", "The file holds no request: give it one in each line.")
            )
        found.problems.sort(key=lambda problem: problem.line or 0)
        del found.problems[MOST_PROBLEMS:]
        found.model = self._models.pop() if len(self._models) == 1 else None
        return found

    async def _check(self, request: LineRequest) -> None:
        self._repeated(await self._names.add(request.custom_id, request.number))
        model = request.body.get("model")
        if not isinstance(model, str) or not model:
            return  # The endpoint will say so.
        if why := await self._check_model(model):
            message = f"Line {request.number}: {why}"
            self._found.problems.append(Problem("model_not_found", message, request.number, "body.model"))
        elif len(self._models) < 2:
            self._models.add(model)

    def _repeated(self, repetitions: list[tuple[int, int]]) -> None:
        for number, first in repetitions:
            message = f"Line {number}: its 'custom_id' is line {first}'s. Give each line one of its own."
            self._found.problems.append(Problem("duplicate_custom_id", message, number, "custom_id"))
