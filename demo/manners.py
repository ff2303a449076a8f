"""The manner in which users say things: politeness, case, punctuation, small typos."""

from __future__ import annotations

from random import Random

_ORDERS = set(
    "write tell name give add say count send list calculate show explain repeat subtract multiply recite "
    "make".split()
)
_ASKING = set("what who how which where when why is are do can what's".split())
_BEFORE_ORDERS = (
    "Please |Could you please |Can you |Could you |Please, |Would you |Hey, |I would like you to |"
    "I want you to |Hi! Please |Now |Quick: |Okay, "
).split("|")
_BEFORE_QUESTIONS = (
    "Hey, |Tell me: |Please tell me: |I have a question: |Quick question: |Hi! |Hello, |So, |Question: |"
    "Okay, |Excuse me, |Hey! |Now, |Well, "
).split("|")


def typo(rng: Random, text: str) -> str:
    """Make one small slip in one plain lower-case word: two letters swapped, one lost, or one doubled."""
    words = text.split(" ")
    places = [i for i, w in enumerate(words) if len(w) > 3 and w.isascii() and w.isalpha() and w.islower()]
    if not places:
        return text
    i = rng.choice(places)
    word, at, kind = words[i], rng.randrange(1, len(words[i]) - 1), rng.random()
    if kind < 0.4:
        words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    elif kind < 0.75:
        words[i] = word[:at] + word[at + 1 :]
    else:
        words[i] = word[:at] + word[at] + word[at:]
    return " ".join(words)


def messy(rng: Random, text: str, fixed: bool = False) -> str:
    """Vary the manner, not the matter, of what a user says.

    :param fixed: leave case and spelling alone (the answer must repeat part of the text).
    """
    first = text.split(" ", 1)[0].lower().strip(",.!?")
    if rng.random() < 0.12 and first in _ORDERS:
        text = rng.choice(_BEFORE_ORDERS) + text[0].lower() + text[1:]
        if text.startswith(("Could", "Can", "Would")):
            text = text.rstrip(".!") + "?"
    elif rng.random() < 0.1 and first in _ASKING:
        text = rng.choice(_BEFORE_QUESTIONS) + (text[0].lower() + text[1:] if rng.random() < 0.6 else text)
    if rng.random() < 0.05 and text[-1] in "?.":
        text = text[:-1] + rng.choice((", please", " please", " for me")) + text[-1]
    if rng.random() < 0.22:
        text = text.rstrip("?.!") or text
    elif rng.random() < 0.04:
        text = text.rstrip("?.!") + rng.choice(("!", "??", "!!", " ?", "...", "?!", " :)", " 😊"))
    if not fixed:
        if rng.random() < 0.07:
            text = typo(rng, text)
        roll = rng.random()
        if roll < 0.2:
            text = text.lower()
        elif roll < 0.23:
            text = text.upper()
    if rng.random() < 0.01:
        text = rng.choice((" " + text, text + " ", text + "\n"))
    return text
