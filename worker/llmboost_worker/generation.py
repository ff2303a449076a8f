"""One job, from claim to seal: prompt -> engine -> text -> stream.

Tokens flow one way and without a task switch each: the engine's step is handed to `Generator.deliver`,
every `Generation` turns its part into text and hands that to the publisher. The coroutine that runs the
job only waits for the last of them and seals.

**Priority.** Batch jobs take every free slot and give it up when an interactive one needs it, the youngest
first. The engine is told at once to drop their sequences and to take on the others, so the slot changes hands
at its next step, and of a sequence at most the token is lost that it was getting in the step under way. What
had been delivered is appended, and the job goes back to its queue, near the head.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from llmboost.entries import REQUEST_LOST, ChoiceDelta, StreamError, Terminal, Usage
from llmboost.jobs import GenerationJob
from llmboost.streams import SealOutcome, StreamEnded, TokenStreams, Writer
from llmboost.transcript import StreamGap, Transcript
from llmboost_worker.checks import Refused, check_bias, compiled, encoded, most_tokens
from llmboost_worker.engine.interface import Engine, EngineInfo, SequenceOutput, SequenceRequest, StepOutput
from llmboost_worker.logprobs import of_tokens
from llmboost_worker.publisher import Outbox, Publisher
from llmboost_worker.text import ChoiceText, Tokenizer, render_prompt
from llmboost_worker.text.detokenizer import Detokenizer, continued

logger = logging.getLogger(__name__)


class GaveWay(Exception):
    """The job is unfinished and goes back to its queue, since another needed its slots."""


@dataclass(slots=True)
class Choice:
    """One of a request's answers while it is being generated."""

    index: int
    text: ChoiceText
    detokenizer: Detokenizer
    """Of all its text, with what is held back for stop strings: says where each logprob's token is."""
    echo: str | None = None
    """The prompt's text, which goes out with its logprobs."""
    position: int = 0
    """Tokens emitted, those of earlier attempts included."""
    finish_reason: str | None = None


@dataclass(slots=True)
class Generation:
    """A job in this worker's hands."""

    job: GenerationJob
    outbox: Outbox
    sequences: dict[str, Choice] = field(default_factory=dict)
    """By the id that the engine knows."""
    first_sequence: str = ""
    """The first of those that this attempt runs."""
    prompt_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    """How many of these this attempt found computed. Its first choice counts: the others share a prompt with
    it, and find that always."""
    announced: bool = False
    """Whether the number of them has gone out with a delta of this attempt."""
    done: "asyncio.Future[StreamError | None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """Resolves when every choice has finished, or with the error that ends them all."""
    gives_way: bool = False
    """Its sequences are no longer in the engine. What that has handed over before is still taken in."""
    ended: StreamEnded | None = None
    """Why nothing more may be written; it may come when all has been generated and not yet appended."""

    def end(self, error: StreamError | None = None) -> None:
        """All choices have finished, or none will."""
        if not self.done.done():
            self.done.set_result(error)

    def give_way(self) -> None:
        """Another job has its slots."""
        self.gives_way = True
        self.end()

    def abandon(self, ended: StreamEnded) -> None:
        """The stream is no longer ours to write."""
        self.ended = ended
        if not self.done.done():
            self.done.set_exception(ended)

    @property
    def live_sequences(self) -> list[str]:
        """Ids of the sequences that the engine still runs."""
        return [sequence for sequence, choice in self.sequences.items() if choice.finish_reason is None]


class Generator:
    """Runs jobs on one engine."""

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        tokenizer: Tokenizer,
        streams: TokenStreams,
        publisher: Publisher,
        worker: str,
    ) -> None:
        self._engine = engine
        self._info = info
        self._tokenizer = tokenizer
        self._streams = streams
        self._publisher = publisher
        self._worker = worker
        self._by_sequence: dict[str, Generation] = {}
        self.running: dict[str, Generation] = {}
        """By job id."""
        self.evictions = 0
        """Jobs that gave way while they ran."""

    async def run(self, job: GenerationJob, attempt: int) -> None:
        """Generates until the request has ended, and seals its stream.

        Returns too if the stream was ended by somebody else or taken over by a later attempt. Cancelling it
        leaves the stream open, to be continued by the next attempt.

        Raises:
            GaveWay: the same, since another job has its slots.
        """
        writer = Writer(job.id, attempt)
        generation = Generation(job, Outbox(writer, on_end=lambda ended: generation.abandon(ended)))
        try:
            await self._generate(generation)
        except StreamEnded as ended:
            logger.info("%s", ended)
        except Refused as refused:
            await self._seal(writer, refused.error, None)
        except GaveWay:
            logger.info("%s gives way, to be continued later", job.id)
            raise
        except StreamGap as gap:
            logger.error("request lost with the server of Redis: request_id=%s %s", job.id, gap)
            await self._seal(writer, REQUEST_LOST, None)
        except Exception as error:
            logger.exception("request failed: request_id=%s", job.id)
            await self._seal(writer, _worker_error(error), None)
        finally:
            self._forget(generation)

    async def _generate(self, generation: Generation) -> None:
        job, writer = generation.job, generation.outbox.writer
        transcript = await self._streams.begin(writer, self._worker)
        self.running[job.id] = generation
        prompt_ids = await encoded(job, self._tokenizer, self._info)
        generation.prompt_ids = prompt_ids
        check_bias(job, self._info)
        max_tokens = most_tokens(job, len(prompt_ids), self._info)
        grammar = await compiled(job, self._engine)
        requests = self._resume(generation, transcript, prompt_ids, max_tokens, grammar)
        if not requests:
            generation.end()
        for request in requests:
            self._by_sequence[request.id] = generation
            generation.first_sequence = generation.first_sequence or request.id
        self._admit(generation, requests)
        error = await generation.done
        if generation.gives_way:
            await asyncio.sleep(0)  # what the engine is just handing over is not lost
        await self._publisher.finish(generation.outbox)  # of what gives way, more may come meanwhile
        if generation.ended is not None:
            # What was not appended has been discarded: sealing now would end the stream without it.
            raise generation.ended
        if generation.gives_way and generation.live_sequences:
            raise GaveWay
        usage = Usage(
            len(generation.prompt_ids),
            sum(choice.position for choice in generation.sequences.values()),
            generation.cached_tokens,
        )
        await self._seal(writer, error, usage)

    def _admit(self, generation: Generation, requests: list[SequenceRequest]) -> None:
        """Hands sequences to the engine, and takes others out of it if they don't fit beside them."""
        others = [each for each in self.running.values() if each is not generation and not each.gives_way]
        free = self._info.max_num_seqs - sum(len(each.live_sequences) for each in others)
        if generation.job.job_class == "batch":
            if requests and free <= 0:  # an interactive job was quicker
                generation.give_way()
                return
            self._engine.add(requests)
            return
        batch = [
            each
            for each in others
            if each.job.job_class == "batch" and each.live_sequences and not each.done.done()
        ]
        batch.sort(key=lambda each: each.job.created)
        leaving: list[str] = []
        while batch and free < len(requests):
            youngest = batch.pop()
            leaving += youngest.live_sequences
            free += len(youngest.live_sequences)
            youngest.give_way()
            self.evictions += 1
        # In this order: a step that began in between would find a slot free and nobody to take it.
        self._engine.add(requests)
        if leaving:
            self._engine.cancel(leaving)

    async def _seal(self, writer: Writer, error: StreamError | None, usage: Usage | None) -> None:
        by = f"{self._worker}/{writer.attempt}"
        outcome = await self._streams.seal(writer.job_id, Terminal(by, usage, error), writer)
        if outcome is not SealOutcome.WRITTEN:
            logger.info("%s: not sealed by attempt %d: %s", writer.job_id, writer.attempt, outcome.name)

    def produced_for(self, job_id: str, attempt: int) -> float:
        """Seconds for which an attempt has been appending tokens."""
        generation = self.running.get(job_id)
        if generation is None or generation.outbox.writer.attempt != attempt:
            return 0.0
        return generation.outbox.produced_for

    def end(self, job_id: str, ended: StreamEnded) -> None:
        """Frees a job's slots now: it is no longer ours, or no longer wanted."""
        generation = self.running.get(job_id)
        if generation is not None:
            self._publisher.discard(generation.outbox)
            generation.abandon(ended)

    def _forget(self, generation: Generation) -> None:
        self._publisher.discard(generation.outbox)
        live = generation.live_sequences
        if live:
            self._engine.cancel(live)
        for sequence in generation.sequences:
            self._by_sequence.pop(sequence, None)
        self.running.pop(generation.job.id, None)

    # Before the first token

    def _resume(
        self,
        generation: Generation,
        transcript: Transcript,
        prompt_ids: list[int],
        max_tokens: int,
        grammar: Any,
    ) -> list[SequenceRequest]:
        """Sets up the choices where the log leaves them; returns the sequences that have still to run."""
        job = generation.job
        requests: list[SequenceRequest] = []
        opening: list[ChoiceDelta] = []
        # The output of a chat is a text of its own; that of a plain prompt goes on where the prompt ends.
        continues = prompt_ids if job.prompt.messages is None else ()
        for index in range(job.sampling.n):
            text = ChoiceText(self._tokenizer, job.sampling, continues, self._info.eos_token_ids)
            choice = Choice(index, text, self._tokenizer.detokenizer(continues))
            sequence = f"{job.id}#{generation.outbox.writer.attempt}.{index}"
            generation.sequences[sequence] = choice
            before = transcript.choices.get(index)
            sampling = job.sampling
            if before is not None:  # what begins a choice was emitted with its first tokens
                sampling = structs.replace(sampling, prompt_logprobs=None)
            output_ids: list[int] = []
            if before is not None:
                output_ids = before.token_ids
                choice.text.replay(output_ids)
                if job.sampling.top_logprobs is not None:
                    choice.detokenizer = continued(choice.detokenizer, output_ids)
                choice.position = len(output_ids)
                choice.finish_reason = before.finish_reason
            elif job.echo:
                prompt = render_prompt(self._tokenizer, job.prompt, job.created)
                if sampling.prompt_logprobs is None:
                    opening.append(ChoiceDelta(index, 0, [], prompt))
                else:
                    choice.echo = prompt
            if choice.finish_reason is None and max_tokens == 0 and choice.echo is None:
                choice.finish_reason = "length"
                opening.append(ChoiceDelta(index, 0, [], "", "length"))
            if choice.finish_reason is None:
                requests.append(
                    SequenceRequest(
                        id=sequence,
                        prompt_ids=prompt_ids,
                        sampling=sampling,
                        choice=index,
                        output_ids=list(output_ids),
                        max_tokens=max_tokens,
                        priority=0 if job.job_class == "interactive" else 1,
                        grammar=grammar,
                    )
                )
        if opening:
            self._publish(generation, opening)
        return requests

    # Each step

    def deliver(self, step: StepOutput) -> None:
        """Takes one step of the engine; called on the event loop."""
        deltas: dict[str, list[ChoiceDelta]] = {}
        stopped: list[str] = []
        for output in step:
            generation = self._by_sequence.get(output.id)
            if generation is None or (generation.done.done() and not generation.gives_way):
                continue
            choice = generation.sequences[output.id]
            if choice.finish_reason is not None:
                continue
            if output.finish_reason == "error":
                generation.end(_error_of(generation.job.id, output))
                continue
            if output.id == generation.first_sequence:
                generation.cached_tokens += output.cached_tokens
            try:
                added = [*self._echo(generation, choice, output), self._advance(choice, output)]
            except Exception as error:  # whoever comes after it in this step must not lose its tokens
                logger.exception("request failed: request_id=%s sequence=%s", generation.job.id, output.id)
                generation.end(_worker_error(error))
                continue
            deltas.setdefault(generation.job.id, []).extend(added)
            if choice.finish_reason is not None and output.finish_reason is None:
                stopped.append(output.id)  # by a stop string, of which the engine knows nothing
        if stopped:
            self._engine.cancel(stopped)
        for job_id, choices in deltas.items():
            generation = self.running[job_id]
            self._publish(generation, choices)
            if not generation.live_sequences:
                generation.end()

    def _publish(self, generation: Generation, choices: list[ChoiceDelta]) -> None:
        prompt_tokens = None if generation.announced else len(generation.prompt_ids)
        generation.announced = True
        self._publisher.publish(generation.outbox, choices, prompt_tokens)

    def _echo(self, generation: Generation, choice: Choice, output: SequenceOutput) -> list[ChoiceDelta]:
        """The prompt, if it goes out with the choice's first token: in one entry, so that a later attempt
        finds both or none."""
        text, choice.echo = choice.echo, None
        if text is None:
            return []
        logprobs = None
        if output.prompt_logprobs is not None:
            logprobs = of_tokens(
                self._tokenizer,
                self._tokenizer.detokenizer(),
                generation.prompt_ids,
                output.prompt_logprobs,
            )
        return [ChoiceDelta(choice.index, 0, [], text, None, logprobs)]

    def _advance(self, choice: Choice, output: SequenceOutput) -> ChoiceDelta:
        """What new tokens add to a choice; tokens behind a stop string are dropped."""
        position, parts, used, stopped = choice.position, [], 0, choice.text.stopped
        for token_id in output.token_ids:
            if stopped:
                break
            text, stopped = choice.text.push(token_id)
            parts.append(text)
            used += 1
        if not stopped and output.finish_reason is not None:
            parts.append(choice.text.finish())
        choice.position += used
        choice.finish_reason = "stop" if stopped else output.finish_reason
        logprobs = None
        if output.logprobs is not None:
            logprobs = of_tokens(
                self._tokenizer, choice.detokenizer, output.token_ids[:used], output.logprobs
            )
        return ChoiceDelta(
            choice.index, position, output.token_ids[:used], "".join(parts), choice.finish_reason, logprobs
        )


def _error_of(job_id: str, output: SequenceOutput) -> StreamError:
    """What ends a request one of whose sequences the engine gave up, said to the log as well."""
    message = output.error or "The engine failed."
    if output.is_refused:
        logger.info("request refused: request_id=%s %s", job_id, message)
        return StreamError(message, "invalid_request_error", "invalid_request", status=400)
    logger.error("request failed: request_id=%s %s", job_id, message)
    return StreamError(message, code="engine_error")


def _worker_error(error: Exception) -> StreamError:
    return StreamError(
        f"The worker failed on this request: {type(error).__name__}. If it does again, tell the operator: "
        "the log has the cause under the request's id.",
        code="worker_error",
    )
