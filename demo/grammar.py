"""What a story can say: the plots as patterns, against which a told story is held."""

from __future__ import annotations

import itertools
import re

from demo.stories import PLACES, PRONOUNS, TIMES, Plot, plots

_SLOTS = {
    "n": r"[A-Z]\w+",
    "h": r"[A-Z]\w+",
    "place": "|".join(PLACES),
    "time": "|".join(TIMES),
    "s": "she|he|it",
    "o": "her|him|it",
    "p": "her|his|its",
    "hs": "she|he",
    "ho": "her|him",
    "hp": "her|his",
    "topic": r"\w+",
}


def grammar(plot: Plot) -> re.Pattern[str]:
    """Return a pattern that matches what a plot can tell, with every slot in a group of its own."""
    count = itertools.count()

    def pattern(sentence: str) -> str:
        parts = re.split(r"\{(\w+)\}", sentence)
        # Every second part is the name of a slot; groups are called like "hs_17", because each needs its
        # own name.
        return "".join(
            f"(?P<{part.lower()}_{next(count)}>(?i:{_SLOTS[part.lower()]}))" if i % 2 else re.escape(part)
            for i, part in enumerate(parts)
        )

    beats = (
        "(?:" + "|".join(map(pattern, beat.sentences)) + ") " + ("?" if beat.optional else "")
        for beat in plot
    )
    # A story ends with a space here, so that every beat can end with one.
    return re.compile("".join(f"(?:{b[:-1]})?" if b.endswith(" ?") else b for b in beats))


def well_told(story: str, topic: str) -> bool:
    """Say whether a story is one that the grammar could have told.

    Then it follows one plot from its first sentence to its last, and every slot is filled with the same
    word wherever it occurs: it has not forgotten its names, its pronouns or its place.
    """
    for plot in plots(topic):
        if match := grammar(plot).fullmatch(story.strip() + " "):
            filled: dict[str, set[str]] = {}
            for group, value in match.groupdict().items():
                if value is not None:
                    filled.setdefault(group.split("_")[0], set()).add(value.lower())
            helper = tuple(next(iter(filled.get(slot, ())), None) for slot in ("hs", "ho", "hp"))
            one_word_each = all(len(values) == 1 for slot, values in filled.items())
            agree = any(
                all(said in (None, right) for said, right in zip(helper, pronouns, strict=True))
                for pronouns in PRONOUNS.values()
            )
            return one_word_each and agree and filled["n"] != filled.get("h")
    return False
