"""Which sequences take part in a step, and with how many tokens."""

import heapq
import logging

from llmboost_worker.engine.transformers.blocks import BlockManager, CacheFull
from llmboost_worker.engine.transformers.pace import Pace
from llmboost_worker.engine.transformers.sequence import Sequence

logger = logging.getLogger(__name__)

SAT_OUT = 4
"""Steps in a row that a lower class sits out at most: prompts without end must not stop it."""


class Scheduler:
    """Every sequence that decodes gets its token each step; what is left of the step's tokens, as far as
    `Pace` allows, goes to prompts, those already begun first. When blocks run out the newest sequence of the
    lowest class gives up its own and is continued later: since random numbers are keyed by position, nobody
    sees a difference but in time.

    A lower class gives up its slots and its memory to a higher one that waits. While a prompt of the higher
    one is computed it sits out, keeping its slots: the first token comes as soon as on an idle engine.

    Of sequences that begin alike, the first computes the beginning, and the others wait for its blocks
    instead of computing them too. They wait outside, with a slot reserved, for a sequence that has one and is
    no lower in class: it gets on whenever they could, or ends, and then the next in line takes its part.
    """

    def __init__(
        self,
        blocks: BlockManager,
        pace: Pace,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_chunked_prefill: bool,
    ) -> None:
        self._blocks = blocks
        self._pace = pace
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._enable_chunked_prefill = enable_chunked_prefill
        self.running: dict[str, Sequence] = {}
        """Those that hold a slot."""
        self._budget = 0
        """Tokens that the step being scheduled has left."""
        self._sat_out = 0
        """Steps in a row without the lower class."""
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        """A heap by rank."""

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """
        Raises:
            ValueError: the whole cache is too small for it.
        """
        most = self._blocks.num_blocks * self._blocks.block_size
        if sequence.most_tokens > most:
            raise ValueError(
                f"{sequence.most_tokens} tokens of prompt and output are more than the {most} whose keys and "
                "values fit in memory: ask for fewer, or raise kv_cache_memory"
            )
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step, each with its `num_scheduled` and blocks for them."""
        batch: dict[str, Sequence] = {}
        lowest = self._lowest_class()
        taking_part = [one for one in self.running.values() if one.priority <= lowest]
        taking_part.sort(key=lambda sequence: sequence.rank)
        self._budget = self._max_num_batched_tokens
        for sequence in taking_part:
            if sequence.is_decoding:
                self._decode(sequence, batch)
        self._bound_prefill(lowest, len(batch))
        for sequence in taking_part:
            if sequence.id in self.running and not sequence.is_decoding:
                self._take(sequence, batch)
        self._admit(lowest, batch)
        return list(batch.values())

    def remove(self, id: str) -> None:
        """Frees the sequence's slot, or its place in the line. Unknown ids are ignored."""
        sequence = self.running.pop(id, None)
        if sequence is not None:
            self._free(sequence)
            return
        kept = [entry for entry in self._waiting if entry[1].id != id]
        if len(kept) < len(self._waiting):
            heapq.heapify(kept)
            self._waiting = kept

    def _lowest_class(self) -> int:
        """The last class that takes part in this step: the first that has a prompt, unless lower ones have
        sat out for long enough."""
        waiting = [sequence for _, sequence in self._waiting]
        prompts = [sequence for sequence in self.running.values() if not sequence.is_decoding] + waiting
        lowest = max((sequence.priority for sequence in (*self.running.values(), *waiting)), default=0)
        first = min((sequence.priority for sequence in prompts), default=lowest)
        if first == lowest or self._sat_out >= SAT_OUT:
            self._sat_out = 0
            return lowest
        self._sat_out += 1
        return first

    def _bound_prefill(self, lowest: int, decoding: int) -> None:
        """Leaves as much of the budget as prompts may have beside the rows that decode."""
        if not self._enable_chunked_prefill:
            return
        begun = [one for one in self.running.values() if one.priority <= lowest and not one.is_decoding]
        waiting = [sequence for _, sequence in self._waiting if sequence.priority <= lowest]
        prompts = len(begun) + min(len(waiting), self._max_num_seqs - len(self.running))
        longest = max(map(len, begun + waiting), default=0)
        first = min(begun, key=lambda sequence: sequence.rank, default=None)
        context = first.num_cached if first else 0
        self._budget = min(self._budget, self._pace.tokens(decoding, prompts, context, longest))

    def _decode(self, sequence: Sequence, batch: dict[str, Sequence]) -> None:
        """Schedules a running sequence's next token, unless it gives way."""
        while sequence.id in self.running:
            try:
                self._blocks.extend(sequence.table, len(sequence))
            except CacheFull:
                self._preempt(max(self.running.values(), key=lambda each: each.rank), batch)
            else:
                self._take(sequence, batch)
                return

    def _admit(self, lowest: int, batch: dict[str, Sequence]) -> None:
        """Gives slots and blocks to those in line, in order."""
        held_back = []
        while self._waiting and self._budget > 0 and self._waiting[0][1].priority <= lowest:
            sequence = self._waiting[0][1]
            if self._is_computed_by_another(sequence):
                held_back.append(heapq.heappop(self._waiting))
            elif not self._begin(sequence, len(held_back), batch):
                break
        for entry in held_back:
            heapq.heappush(self._waiting, entry)

    def _is_computed_by_another(self, sequence: Sequence) -> bool:
        """Whether the beginning that it lacks will soon be there without it."""
        if sequence.is_scored:
            return False
        table = self._blocks.computed_by(sequence.table, sequence.tokens)
        return table is not None and any(
            other.table is table and other.priority <= sequence.priority for other in self.running.values()
        )

    def _begin(self, sequence: Sequence, reserved: int, batch: dict[str, Sequence]) -> bool:
        """Gives the first in line a slot, blocks for all of its tokens, if need be those that a lower class
        has, and a part in this step. Whether there were any."""
        while len(self.running) + reserved >= self._max_num_seqs:
            if not self._preempt_below(sequence, batch):
                return False
        while True:
            try:
                # Each running sequence soon needs another block: taking their last would throw somebody out.
                found = self._blocks.allocate(
                    sequence.table, sequence.tokens, spare=len(self.running), reuse=not sequence.is_scored
                )
                break
            except CacheFull:
                if not self._preempt_below(sequence, batch):
                    return False
        heapq.heappop(self._waiting)
        sequence.begin(found)
        if not self._chunk(sequence, batch):
            self._free(sequence)
            self.add(sequence)
            return False
        self.running[sequence.id] = sequence
        self._take(sequence, batch)
        return True

    def _take(self, sequence: Sequence, batch: dict[str, Sequence]) -> None:
        """Gives a sequence as many tokens of this step as it can have, if any."""
        tokens = self._chunk(sequence, batch)
        if tokens:
            sequence.num_scheduled = tokens
            batch[sequence.id] = sequence
            self._budget -= tokens

    def _chunk(self, sequence: Sequence, batch: dict[str, Sequence]) -> int:
        """Tokens that the sequence can have in this step."""
        if self._enable_chunked_prefill or sequence.num_uncached <= self._budget:
            return max(0, min(sequence.num_uncached, self._budget))
        alone = all(other.is_decoding for other in batch.values())
        return sequence.num_uncached if alone else 0

    def _preempt_below(self, sequence: Sequence, batch: dict[str, Sequence]) -> bool:
        """Whether a running sequence of a lower class has given up its slot."""
        victim = max(self.running.values(), key=lambda each: each.rank, default=None)
        if victim is None or victim.priority <= sequence.priority:
            return False
        self._preempt(victim, batch)
        return True

    def _preempt(self, sequence: Sequence, batch: dict[str, Sequence]) -> None:
        logger.info("sequence %s gives up its blocks of %d tokens", sequence.id, sequence.num_cached)
        if batch.pop(sequence.id, None):
            self._budget += sequence.num_scheduled
        del self.running[sequence.id]
        self._free(sequence)
        self.add(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._blocks.free(sequence.table)
        sequence.num_cached = sequence.num_scheduled = 0
