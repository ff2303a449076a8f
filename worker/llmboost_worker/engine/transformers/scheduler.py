"""Which sequences take part in a step, and with how many tokens."""

import heapq
import logging

from llmboost_worker.engine.transformers.cache import CacheFull, SlotCache
from llmboost_worker.engine.transformers.sequence import Sequence

logger = logging.getLogger(__name__)

SAT_OUT = 4
"""Steps in a row that a lower class sits out at most: prompts without end must not stop it."""


class Scheduler:
    """Every sequence that decodes gets its token each step; what is left of the step's tokens goes to
    prompts, those already begun first. When the cache is full the newest sequence of the lowest class gives
    up its slot and is computed again later: since random numbers are keyed by position, nobody sees a
    difference but in time.

    A lower class gives up its slots and its memory to a higher one that waits. While a prompt of the higher
    one is computed it sits out, keeping its slots: the first token comes as soon as on an idle engine.
    """

    def __init__(
        self, cache: SlotCache, max_num_seqs: int, max_num_batched_tokens: int, enable_chunked_prefill: bool
    ) -> None:
        self._cache = cache
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
        self._refused: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step, each with its `num_scheduled` and room in its slot for them."""
        batch: dict[str, Sequence] = {}
        self._budget = self._max_num_batched_tokens
        lowest = self._lowest_class()
        ranked = sorted(self.running.values(), key=lambda sequence: (not sequence.is_decoding, sequence.rank))
        for sequence in ranked:
            if sequence.priority <= lowest:
                self._continue(sequence, batch)
        while self._waiting and self._waiting[0][1].priority <= lowest:
            if not self._admit(self._waiting[0][1], batch):
                break
        return list(batch.values())

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

    def take_refused(self) -> list[Sequence]:
        """Sequences that the cache couldn't hold even alone; they are no longer here."""
        refused, self._refused = self._refused, []
        return refused

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

    def _continue(self, sequence: Sequence, batch: dict[str, Sequence]) -> None:
        """Schedules a running sequence's next token or chunk, unless it gave way in this step."""
        while sequence.id in self.running and sequence.slot is not None:
            tokens = self._chunk(sequence, batch)
            if not tokens:
                return
            try:
                self._cache.extend(sequence.slot, max(sequence.num_cached + tokens, sequence.slot.length))
                self._take(sequence, tokens, batch)
                return
            except CacheFull:
                self._preempt(self._last_in_rank(), batch)

    def _admit(self, sequence: Sequence, batch: dict[str, Sequence]) -> bool:
        """Gives the first in line a slot for all of its tokens, if need be one that a lower class has."""
        tokens = self._chunk(sequence, batch)
        if not tokens:
            return False
        while len(self.running) >= self._max_num_seqs:
            if not self._preempt_below(sequence, batch):
                return False
        while sequence.slot is None:
            try:
                sequence.slot = self._cache.allocate(len(sequence))
            except CacheFull as error:
                if self._preempt_below(sequence, batch):
                    continue
                if self.running:
                    return False
                heapq.heappop(self._waiting)
                logger.error(
                    "sequence %s of %d tokens has no room in the cache: %s", sequence.id, len(sequence), error
                )
                self._refused.append(sequence)
                return True
        heapq.heappop(self._waiting)
        self.running[sequence.id] = sequence
        self._take(sequence, tokens, batch)
        return True

    def _take(self, sequence: Sequence, tokens: int, batch: dict[str, Sequence]) -> None:
        sequence.num_scheduled = tokens
        batch[sequence.id] = sequence
        self._budget -= tokens

    def _chunk(self, sequence: Sequence, batch: dict[str, Sequence]) -> int:
        """Tokens that the sequence can have in this step."""
        if self._enable_chunked_prefill or sequence.num_uncached <= self._budget:
            return max(0, min(sequence.num_uncached, self._budget))
        alone = all(other.is_decoding for other in batch.values())
        return sequence.num_uncached if alone else 0

    def _last_in_rank(self) -> Sequence:
        return max(self.running.values(), key=lambda sequence: sequence.rank)

    def _preempt_below(self, sequence: Sequence, batch: dict[str, Sequence]) -> bool:
        """Whether a running sequence of a lower class has given up its slot."""
        victim = self._last_in_rank() if self.running else None
        if victim is None or victim.priority <= sequence.priority:
            return False
        self._preempt(victim, batch)
        return True

    def _preempt(self, sequence: Sequence, batch: dict[str, Sequence]) -> None:
        logger.info("sequence %s gives up its slot of %d tokens", sequence.id, sequence.num_cached)
        if batch.pop(sequence.id, None):
            self._budget += sequence.num_scheduled
        del self.running[sequence.id]
        self._free(sequence)
        self.add(sequence)

    def _free(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._cache.free(sequence.slot)
        sequence.slot = None
        sequence.num_cached = sequence.num_scheduled = 0
