"""Stop strings: where a text ends, without ever showing a part of what ends it.

Source of the automaton: Aho and Corasick, "Efficient string matching" (CACM 18(6), 1975). It reads one
character at a time and keeps one number, so where the text stops can't depend on how it was cut into
chunks, and the cost is linear however many stop strings there are.
"""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class _Automaton:
    """A trie of the stop strings; state 0 is its root. A state stands for the longest end of the text read so
    far that is the beginning of a stop string."""

    children: tuple[dict[str, int], ...]
    fail: tuple[int, ...]
    """The state of the next shorter such end."""
    match: tuple[int, ...]
    """Length of the longest stop string that ends here; 0 if none does."""
    hold: tuple[int, ...]
    """How many of the last characters may still become a stop string."""


@lru_cache(maxsize=64)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    children: list[dict[str, int]] = [{}]
    depth = [0]
    match = [0]
    for stop in stops:
        state = 0
        for char in stop:
            if char not in children[state]:
                children[state][char] = len(children)
                children.append({})
                depth.append(depth[state] + 1)
                match.append(0)
            state = children[state][char]
        match[state] = len(stop)

    fail = [0] * len(children)
    hold = [0] * len(children)
    breadth_first = [0]
    for state in breadth_first:
        for char, child in children[state].items():
            breadth_first.append(child)
            if state != 0:
                shorter = fail[state]
                while shorter and char not in children[shorter]:
                    shorter = fail[shorter]
                fail[child] = children[shorter].get(char, 0)
            match[child] = match[child] or match[fail[child]]
            # The end of a stop string that begins no longer one can't become anything: only what follows it
            # can.
            hold[child] = depth[child] if children[child] else hold[fail[child]]
    return _Automaton(tuple(children), tuple(fail), tuple(match), tuple(hold))


class StopStrings:
    """Watches one text for its stop strings.

    The stop string that is complete first ends the text; of several complete at the same character, the one
    that began first. Empty stop strings never match.
    """

    def __init__(self, stops: tuple[str, ...], include_stop: bool = False) -> None:
        """`include_stop`: the stop string itself is visible (and so nothing need be held back)."""
        self._automaton = _automaton(tuple(stop for stop in stops if stop))
        self._include_stop = include_stop
        self._state = 0
        self._held = ""
        self.stopped = False

    def push(self, text: str, active: bool = True) -> tuple[str, bool]:
        """Reads on by `text`; returns what has become visible and whether the text has stopped.

        A stop string counts if its last character comes in an active push. One that is complete in an
        inactive push is ordinary text, and visible; one that begins in an inactive push and ends in an
        active one counts. After a stop, nothing more is visible.
        """
        if self.stopped:
            return "", True
        automaton = self._automaton
        children, fail, match = automaton.children, automaton.fail, automaton.match
        state = self._state
        read = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            while state and char not in children[state]:
                state = fail[state]
            state = children[state].get(char, 0)
            if active and match[state]:
                self.stopped = True
                self._held = ""
                return read[: end if self._include_stop else end - match[state]], True
        self._state = state
        visible = len(read) if self._include_stop else len(read) - automaton.hold[state]
        self._held = read[visible:]
        return read[:visible], False

    def flush(self) -> str:
        """The text has ended otherwise: releases what was held back."""
        held, self._held, self._state = self._held, "", 0
        return held
