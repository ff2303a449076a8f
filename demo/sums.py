"""Arithmetic: small sums in many phrasings, some of which are held out for the evaluation."""

from __future__ import annotations

import hashlib
import re
from random import Random

from demo.manners import messy
from demo.texts import phrases

Exchange = tuple[str, str]

SUM_ASKS = phrases("sum")
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
RESULT = re.compile(r"\d+ [+*-] \d+ = (\d+)\.$")


def held_out(a: int, b: int, phrasing: int | None) -> bool:
    """Say whether the corpus must not contain this sum.

    Up to 20 every pair is learnt, but a tenth of the pairs in each phrasing is held out; beyond 20, one
    pair in twenty never occurs at all, in any phrasing.
    """
    if max(a, b) > 20:
        key, part = f"{min(a, b)}+{max(a, b)}", 20
    elif phrasing is None:
        return False
    else:
        key, part = f"{a}+{b}#{phrasing}", 10
    return hashlib.sha256(key.encode()).digest()[0] % part == 0


def addition(rng: Random) -> Exchange:
    """Add two numbers: mostly up to 20, sometimes up to 50.

    The answer repeats the sum, so that the result stands next to what it is made of.
    """
    while True:
        top = 20 if rng.random() < 0.6 else 50
        a, b, phrasing = rng.randint(0, top), rng.randint(0, top), rng.randrange(len(SUM_ASKS))
        if not held_out(a, b, phrasing):
            break
    text = SUM_ASKS[phrasing]
    if max(a, b) <= 20 and rng.random() < 0.12:
        text = text.replace("+", " plus ").replace("  ", " ")
        text = text.replace("{a}", NUMBER_WORDS[a]).replace("{b}", NUMBER_WORDS[b])
    else:
        text = text.replace("{a}", str(a)).replace("{b}", str(b))
    return messy(rng, text), f"{a} + {b} = {a + b}."


def arithmetic(rng: Random) -> Exchange:
    """Subtract, multiply, compare, or name the next number."""
    roll, few = rng.random(), rng.random() < 0.6
    if roll < 0.45:
        b = rng.randint(0, 20)
        a = b + rng.randint(0, 20)
        name, answer = "minus", f"{a} - {b} = {a - b}."
    elif roll < 0.7:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        name, answer = "times", f"{a} * {b} = {a * b}."
    elif roll < 0.85:
        a, b = rng.sample(range(20 if few else 100), 2)
        name, answer = "bigger", f"{max(a, b)} is bigger than {min(a, b)}."
    else:
        a, b = rng.randint(0, 20 if few else 98), 0
        name, answer = "next number", f"The number after {a} is {a + 1}."
    text = rng.choice(phrases(name)).replace("{a}", str(a)).replace("{b}", str(b))
    return messy(rng, text), answer


def follow_up(rng: Random, previous: str) -> Exchange | None:
    """Go on calculating with the result of the answer before, if that was a sum and is not too large."""
    match = RESULT.search(previous)
    if not match or int(match[1]) > 60:
        return None
    a = int(match[1])
    if rng.random() < 0.8 or a < 1:
        b = rng.choice((1, 2, 3, 5, 10, rng.randint(1, 20)))
        if held_out(a, b, None):
            b = 0
        return messy(rng, rng.choice(phrases("follow plus")).replace("{b}", str(b))), f"{a} + {b} = {a + b}."
    b = rng.randint(1, min(a, 20))
    return messy(rng, rng.choice(phrases("follow minus")).replace("{b}", str(b))), f"{a} - {b} = {a - b}."
