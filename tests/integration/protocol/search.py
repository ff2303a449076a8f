"""Goes through the orders in which things can happen: all of them, or one."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from tests.integration.protocol.model import Model, State
from tests.integration.protocol.rules import Broken, Rules, demand

PATIENCE = 500
"""Moves within which, if nothing more goes wrong, a walk ends."""


@dataclass
class Explored:
    """What a search has seen."""

    states: int = 0
    moves: int = 0
    ends: int = 0


def explore(model: Model, disturbances: int) -> Explored:
    """Every order of everything with up to so many disturbances on one way; those with fewer come first, so
    a way that is reported as broken is one with the fewest.

    Raises:
        Broken: the protocol forbids what can happen; says by which moves.
    """
    rules = Rules(model)
    start = model.start
    origin: dict[State, tuple[State, str] | None] = {start: None}
    cost = {start: 0}
    ahead = deque([start])
    done: set[State] = set()
    calm: dict[State, list[State]] = {}
    """States by those that lead to them with nothing going wrong."""
    ends = []
    explored = Explored()

    def way(state: State) -> str:
        names = []
        while (step := origin[state]) is not None:
            state, name = step
            names.append(name)
        return _numbered(reversed(names))

    later: deque[State] = deque()
    while ahead or later:
        if not ahead:
            ahead, later = later, ahead
        state = ahead.popleft()
        if state in done:
            continue
        done.add(state)
        quiet = True
        for move in model.moves(state, calm=cost[state] == disturbances):
            explored.moves += 1
            to = move.to
            try:
                rules.check(state, move)
            except Broken as broken:
                raise Broken(f"{broken}\n{way(state)}\n  -> {move.name}") from None
            if not move.disturbs:
                quiet = quiet and move.late
                calm.setdefault(to, []).append(state)
            total = cost[state] + move.disturbs
            if total <= disturbances and total < cost.get(to, disturbances + 1):
                cost[to] = total
                origin[to] = state, move.name
                (later if move.disturbs else ahead).append(to)
        if quiet:
            try:
                rules.check_end(state)
            except Broken as broken:
                raise Broken(f"at the end: {broken}\n{way(state)}") from None
            ends.append(state)
    explored.states, explored.ends = len(done), len(ends)
    # From everywhere, if nothing more goes wrong, an end can be reached.
    reached = set(ends)
    while ends:
        for state in calm.get(ends.pop(), ()):
            if state not in reached:
                reached.add(state)
                ends.append(state)
    for state in done - reached:
        raise Broken(f"no end can be reached from here:\n{way(state)}")
    return explored


def walk(model: Model, choices: Sequence[int]) -> None:
    """One way: each choice takes a move, then nothing more goes wrong until the end.

    Raises:
        Broken: as `explore`.
    """
    rules = Rules(model)
    state, names = model.start, []
    try:
        for number in count():
            calm = number >= len(choices)
            moves = list(model.moves(state, calm=calm))
            if all(move.late for move in moves):
                rules.check_end(state)
                return
            demand(number < len(choices) + PATIENCE, "no end is reached")
            # Calmly by turns, for no move may wait for ever.
            move = moves[(number if calm else choices[number]) % len(moves)]
            names.append(move.name)
            rules.check(state, move)
            state = move.to
    except Broken as broken:
        raise Broken(f"{broken}\n{_numbered(names)}") from None


def follow(model: Model, *names: str) -> State:
    """Where moves lead whose names begin so; each must be possible, and one alone."""
    state = model.start
    for name in names:
        [state] = [move.to for move in model.moves(state, calm=False) if move.name.startswith(name)]
    return state


def _numbered(names: Iterable[str]) -> str:
    return "\n".join(f"{number:3}. {name}" for number, name in enumerate(names, start=1))
