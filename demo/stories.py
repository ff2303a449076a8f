"""A story grammar: plots made of beats, each beat with several phrasings.

A plot is a list of beats in order, and each beat is a list of sentences that may stand in for one another,
so a plot of eight beats with three phrasings each tells 3**8 stories before any name is filled in. What is
decided once per story (names, pronouns, places) is filled into every beat; that is what keeps a story about
the same character from its first sentence to its last. The plots are in ``text/stories.txt``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

from demo.texts import named, sections, words

GIRLS, BOYS, AI_NAMES = words("girls"), words("boys"), words("ai names")
PLACES, PET_NAMES, ANIMALS = words("places"), words("pet names"), words("animals")
TIMES = ("one morning", "one day", "one afternoon", "one evening", "one rainy day", "one cold night")

# Subject, object and possessive.
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his"), "it": ("it", "it", "its")}

# Topics that have plots of their own, and what a reader may call each.
TOPICS: dict[str, tuple[str, ...]] = named("topic ")


@dataclass(frozen=True)
class Beat:
    """Sentences that may stand in for one another, and whether a short story may do without them."""

    sentences: tuple[str, ...]
    optional: bool


Plot = tuple[Beat, ...]


@cache
def plots(topic: str) -> tuple[Plot, ...]:
    """Return the plots for a topic; any animal shares those for ``animal``."""
    out: list[Plot] = []
    for name, lines in sections("stories.txt"):
        if name.split(":")[0] != topic:
            continue
        groups: list[list[str]] = [[]]
        for line in lines:
            if line:
                groups[-1].append(line)
            else:
                groups.append([])
        out.append(
            tuple(Beat(tuple(s.removeprefix("? ") for s in g), g[0].startswith("? ")) for g in groups if g)
        )
    return tuple(out)


def made_up_name(rng: Random) -> str:
    """Return an invented name of two or three syllables, so that the model learns to copy, not to recall."""
    onsets = "b br c d dr f g gr h j k kl l m n p pr qu r s sh st t th tr v w y z zh".split()
    vowels = "a e i o u ai ea io ou".split()
    ends = ["", "", "", "n", "r", "s", "l", "x", "th", "k", "m", "nd", "sh"]
    parts = [rng.choice(onsets) + rng.choice(vowels) for _ in range(rng.choice((2, 2, 2, 3)))]
    return ("".join(parts) + rng.choice(ends)).capitalize()


def person(rng: Random) -> tuple[str, str]:
    """Return a first name and the pronoun that goes with it."""
    return (rng.choice(GIRLS), "she") if rng.random() < 0.5 else (rng.choice(BOYS), "he")


def fill(text: str, slots: dict[str, str]) -> str:
    """Fill ``{slot}`` names in ``text``; a slot with a capital gives the value with a capital."""
    for key, value in slots.items():
        text = text.replace("{" + key + "}", value)
        text = text.replace("{" + key[0].upper() + key[1:] + "}", value[0].upper() + value[1:])
    return text


def tell(
    rng: Random, topic: str | None = None, short: bool = False, hero: str | None = None
) -> tuple[str, dict[str, str]]:
    """Tell one story.

    :param rng: where every choice comes from.
    :param topic: one of ``TOPICS``, or an animal, or ``None`` for any.
    :param short: leave the optional beats out.
    :param hero: the name of the hero, if the reader wants a certain one.
    :return: the story, and what its slots were filled with.
    """
    if topic is None:
        topic = rng.choice((*TOPICS, rng.choice(ANIMALS)))
    helper, helper_is = person(rng)
    plot = rng.choice(plots(topic) or plots("animal"))
    if topic in ("ai", "robot"):
        name, who = rng.choice(AI_NAMES), "it"
    elif topic in ("cat", "dog") or topic not in TOPICS:
        name, who = rng.choice(PET_NAMES), rng.choice(("she", "he"))
    else:
        name, who = person(rng)
    name = hero or name
    while helper == name:
        helper, helper_is = person(rng)
    slots = dict(zip("sop", PRONOUNS[who], strict=True))
    slots |= dict(zip(("hs", "ho", "hp"), PRONOUNS[helper_is], strict=True))
    slots |= {"n": name, "h": helper, "place": rng.choice(PLACES), "time": rng.choice(TIMES), "topic": topic}
    told = [fill(rng.choice(beat.sentences), slots) for beat in plot if not (short and beat.optional)]
    return " ".join(beat[0].upper() + beat[1:] for beat in told), slots
