"""Token streams written the way a worker writes them, without a model."""

from collections.abc import Sequence

from llmboost.entries import ChoiceDelta, Delta, ReadEntry, Terminal, Usage
from llmboost.jobs import GenerationJob, Prompt, SamplingParams, now
from llmboost.queue import JobQueue
from llmboost.streams import TokenStreams, Writer, persist


class Log:
    """One accepted request and the attempt that answers it."""

    def __init__(self, queue: JobQueue, job_id: str) -> None:
        self.queue = queue
        self.streams: TokenStreams = queue.streams
        self.id = job_id
        self.writer = Writer(job_id, 0)
        self.position = 0

    async def open(self, *, audience: float = 60.0) -> "Log":
        """Accepts the request as a pod does, and takes it out of the queue."""
        created = now()
        job = GenerationJob(
            id=self.id,
            model="test",
            prompt=Prompt(text=""),
            sampling=SamplingParams(),
            created=created,
            deadline=created + 60,
        )
        await self.queue.submit(job, audience=audience)
        await self.queue.discard(self.id)
        return self

    async def begin(self) -> "Log":
        """Starts the next attempt."""
        self.writer = Writer(self.id, self.writer.attempt + 1)
        transcript = await self.streams.begin(self.writer, "test-worker")
        self.position = transcript.completion_tokens
        return self

    async def write(self, texts: Sequence[str], *, skip: int = 0) -> None:
        """Appends one entry per text, a token each; with `skip`, as if so many had been lost before."""
        self.position += skip
        entries = [
            (self.writer.next_id(), Delta([ChoiceDelta(0, self.position + i, [ord(text[-1])], text)]))
            for i, text in enumerate(texts)
        ]
        self.position += len(texts)

        async def send() -> None:
            replies = await self.streams.append([(self.id, *entry) for entry in entries])
            for (entry_id, _), reply in zip(entries, replies, strict=True):
                if isinstance(reply, Exception) and entry_id != entries[-1][0]:
                    continue  # An earlier one of a batch that was sent twice.
                await self.streams.check_reply(self.writer, entry_id, reply)

        await persist(send)

    async def seal(self) -> None:
        """Ends the stream."""
        await self.streams.seal(self.id, Terminal("test-worker", Usage(0, self.position)))


def text_of(entries: Sequence[ReadEntry]) -> str:
    """What a client would have seen."""
    return "".join(
        choice.text for _, entry in entries if isinstance(entry, Delta) for choice in entry.choices
    )
