"""Facts: tables of what the demo model is to know, the ways to ask for them, and how they are answered.

There are few ways to answer on purpose: at temperature 1 every choice that carries no meaning is one more
chance to derail. The tables are in ``text/facts.txt``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random

from demo.texts import sections

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
ALPHABET = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass(frozen=True)
class Relation:
    """One kind of fact: a table, how it is asked for, and how it is answered."""

    table: dict[str, str]
    questions: tuple[str, ...]
    answer: str

    def ask(self, rng: Random) -> tuple[str, str]:
        """Ask for one row: return a question and its answer."""
        x, y = rng.choice(list(self.table.items()))
        question, answer = rng.choice(self.questions), self.answer
        if x[0].lower() in "aeiou":
            question, answer = question.replace(" a {x}", " an {x}"), answer.replace("A {x}", "An {x}")
        if y[0].lower() in "aeiou":
            answer = answer.replace(" a {y}", " an {y}")
        answer = answer.replace("{x}", x).replace("{y}", y)
        return question.replace("{x}", x), answer[0].upper() + answer[1:]


def _neighbours(names: list[str], step: int) -> dict[str, str]:
    """Map each name to the one ``step`` places further, around the end."""
    return {name: names[(i + step) % len(names)] for i, name in enumerate(names)}


def _relations() -> dict[str, Relation]:
    """Read the relations, and derive those that have no rows of their own."""
    out: dict[str, Relation] = {}
    for name, lines in sections("facts.txt"):
        rows = dict(line.split(" = ") for line in lines if line[:2] not in ("", "? ", "> "))
        questions = tuple(line[2:] for line in lines if line.startswith("? "))
        answer = next(line[2:] for line in lines if line.startswith("> "))
        out[name] = Relation(rows, questions, answer)
    tables = {
        # Of several names for a country, the first one is the one to answer with.
        "country": {
            city: land for land, city in reversed(out["capital"].table.items()) if city != "Mexico City"
        },
        "letter_after": dict(itertools.pairwise(ALPHABET)),
        "day_after": _neighbours(DAYS, 1),
        "day_before": _neighbours(DAYS, -1),
    }
    for name, table in tables.items():
        out[name] = Relation(table, out[name].questions, out[name].answer)
    for name, step in (("after", 1), ("before", -1)):
        day = out["day_" + name]
        asks = tuple(ask.replace("day", "month") for ask in day.questions if "oday" not in ask)
        out["month_" + name] = Relation(_neighbours(MONTHS, step), asks, day.answer.replace("day", "month"))
    return out


RELATIONS = _relations()
_NAMES = list(RELATIONS)
_WEIGHTS = [len(relation.table) + 8 for relation in RELATIONS.values()]


def fact(rng: Random) -> tuple[str, str]:
    """Ask for one row of one table; large tables are asked for more often."""
    return RELATIONS[rng.choices(_NAMES, _WEIGHTS)[0]].ask(rng)
