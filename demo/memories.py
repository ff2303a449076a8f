"""Conversations with a memory: users say something about themselves and ask for it later."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from demo.chats import a_or_an
from demo.facts import RELATIONS
from demo.manners import messy, typo
from demo.stories import ANIMALS, BOYS, GIRLS, PET_NAMES, PLACES, made_up_name
from demo.sums import Exchange
from demo.texts import phrases, sections, words

# Names that begin so never occur in the corpus; the evaluation makes its unseen names with it.
HELD_OUT_NAME_START = "Vel"


@dataclass(frozen=True)
class Memory:
    """A kind of thing to remember; ``{x}`` stands for it in every sentence."""

    tell: tuple[str, ...]
    ask: tuple[str, ...]
    reply: str
    answer: str
    missing: str


def _memories() -> dict[str, Memory]:
    """Read the kinds of things to remember."""
    out: dict[str, Memory] = {}
    for name, lines in sections("memories.txt"):
        tell = tuple(line for line in lines if line and line[:2] not in ("? ", "> "))
        ask = tuple(line[2:] for line in lines if line.startswith("? "))
        reply, answer, missing = (line[2:] for line in lines if line.startswith("> "))
        out[name] = Memory(tell, ask, reply, answer, missing)
    return out


MEMORIES = _memories()
_CITIES = (
    *PLACES,
    *dict.fromkeys(RELATIONS["capital"].table.values()),
    "New York",
    "Boston",
    "Munich",
    "Milan",
)


def any_name(rng: Random) -> str:
    """Return a known name or an invented one."""
    while True:
        name = rng.choice(GIRLS + BOYS) if rng.random() < 0.3 else made_up_name(rng)
        if not name.startswith(HELD_OUT_NAME_START):
            return name


def _value(rng: Random, kind: str) -> str:
    """Return something to remember."""
    match kind:
        case "name":
            return any_name(rng)
        case "city":
            return rng.choice(_CITIES) if rng.random() < 0.5 else any_name(rng)
        case "age":
            return str(rng.randint(5, 99))
        case "number":
            return str(rng.randint(1, 999 if rng.random() < 0.5 else 50))
        case "word":
            invented = made_up_name(rng)
            return rng.choice((invented, invented.lower(), rng.choice(ANIMALS), rng.choice(words("foods"))))
        case _:
            return rng.choice(words(kind + "s"))


def _say(rng: Random, template: str, x: str) -> str:
    """Vary a sentence without touching the value in it."""
    text = messy(rng, template, fixed=True)
    if rng.random() < 0.08:
        text = typo(rng, text)
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:] if not text.startswith("I") else text
    return text.replace("{x}", x)


class Talk:
    """What has been said so far in one conversation."""

    def __init__(self) -> None:
        """Begin knowing nothing."""
        self.known: dict[str, str] = {}
        self.kinds: dict[str, str] = {}

    def tell(self, rng: Random) -> Exchange:
        """Let the user say something about themselves."""
        roll = rng.random()
        if roll < 0.22:
            pet = roll < 0.12
            who = rng.choice(words("pets" if pet else "relatives"))
            name = rng.choice(PET_NAMES) if pet and rng.random() < 0.4 else any_name(rng)
            slot = "pet" if pet else "relative"
            self.known[slot], self.kinds[slot] = name, who
            text = rng.choice(phrases(slot)).replace("{who}", who).replace("{a}", a_or_an(who))
            return _say(rng, text, name), f"{name} is a nice name" + (
                f" for {a_or_an(who)} {who}." if pet else "."
            )
        if roll < 0.3 and "name" not in self.known:
            name, city = self.known["name"], self.known["city"] = any_name(rng), _value(rng, "city")
            text = _say(rng, rng.choice(phrases("name and city")).replace("{c}", city), name)
            return text, f"Nice to meet you, {name}! {city} sounds like a nice place."
        kind = rng.choice(("name", "name", "name", "name", *MEMORIES))
        if kind in self.known:
            kind = rng.choice([k for k in MEMORIES if k not in self.known] or ["name"])
        said = x = self.known[kind] = _value(rng, kind)
        if kind in ("name", "city") and rng.random() < 0.15:
            said = x.lower()
        elif kind == "word" and rng.random() < 0.2:
            said = f'"{x}"'
        reply = MEMORIES[kind].reply.replace("{x}", x)
        return _say(rng, rng.choice(MEMORIES[kind].tell), said), reply[0].upper() + reply[1:]

    def ask(self, rng: Random) -> Exchange:
        """Let the user ask for something they said before, or never said."""
        kinds = list(self.known)
        if not kinds or rng.random() < 0.12:
            missing = [kind for kind in MEMORIES if kind not in self.known]
            if missing:
                memory = MEMORIES[rng.choice(missing)]
                return messy(rng, rng.choice(memory.ask)), memory.missing
        kind = rng.choice(kinds)
        if kind in self.kinds:
            who = self.kinds[kind]
            asks = [ask.replace("{who}", who) for ask in phrases("who is called")]
            asks += phrases("which pet") if kind == "pet" else [f"Who is my {who}?"]
            return messy(rng, rng.choice(asks)), f"Your {who} is called {self.known[kind]}."
        return messy(rng, rng.choice(MEMORIES[kind].ask)), MEMORIES[kind].answer.replace(
            "{x}", self.known[kind]
        )
