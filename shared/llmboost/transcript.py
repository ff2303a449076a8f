"""What a log says, read from its beginning: nothing that follows a gap.

A server of Redis that was killed may come back without the end of its log, and whoever was writing goes on.
Each delta says how many tokens precede it, so what is missing shows when the next one is read. All reading of
logs goes through `Transcript.read`, so none can pass over a gap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from llmboost.entries import GAP, Delta, Entry, RawEntry, ReadEntry, Terminal, decode


class StreamGap(Exception):
    """An entry is missing between two that were read. Readers end with an error, never pass over it."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.before: list[ReadEntry] = []
        """Of the entries that were read together, those before the gap."""


@dataclass(slots=True)
class ChoiceTranscript:
    """All that the log says of one choice."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class Transcript:
    """The state of a request after some prefix of its log; refuses a log with a gap."""

    prompt_tokens: int | None = None
    choices: dict[int, ChoiceTranscript] = field(default_factory=dict)
    terminal: Terminal | None = None

    def read(self, raw: Sequence[RawEntry]) -> list[ReadEntry]:
        """Decodes the entries that come next in the log, and takes them.

        Raises:
            StreamGap: one of them does not continue what came before.
        """
        entries = decode(raw)
        for i, (entry_id, entry) in enumerate(entries):
            try:
                self.apply(entry_id, entry)
            except StreamGap as gap:
                gap.before = entries[:i]
                raise
        return entries

    def apply(self, entry_id: str, entry: Entry) -> None:
        """Takes the next entry.

        Raises:
            StreamGap: it does not continue what came before.
        """
        match entry:
            case Delta(choices=deltas, prompt_tokens=prompt_tokens):
                for delta in deltas:
                    choice = self.choices.get(delta.index)
                    if choice is None:
                        choice = self.choices[delta.index] = ChoiceTranscript()
                    if delta.position != len(choice.token_ids):
                        raise StreamGap(
                            f"choice {delta.index} continues at token {delta.position}, "
                            f"but {len(choice.token_ids)} were read before entry {entry_id}"
                        )
                    choice.token_ids.extend(delta.token_ids)
                    choice.finish_reason = delta.finish_reason or choice.finish_reason
                if prompt_tokens is not None:
                    self.prompt_tokens = prompt_tokens
            case Terminal():
                self.terminal = entry

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(len(choice.token_ids) for choice in self.choices.values())


def read_log(raw: Sequence[RawEntry]) -> list[ReadEntry]:
    """A log from its beginning, up to a gap if it has one; its end, if it has that, is an error then.

    While nobody has sealed it there is no end to show: its writer goes on, or the next one finds the gap.
    """
    try:
        return Transcript().read(raw)
    except StreamGap as gap:
        entry_id, last = decode(raw[-1:])[0]
        if isinstance(last, Terminal):
            return [*gap.before, (entry_id, replace(last, error=last.error or GAP))]
        return gap.before
