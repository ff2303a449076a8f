"""The corpus: an endless stream of documents, made from a seed.

A document is a conversation or a piece of plain text. There is no data set to download and none to store:
every document is generated when it is needed, so training sees none twice except where the grammar itself
repeats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from demo import chats, facts, sums
from demo.manners import messy
from demo.memories import Talk
from demo.prompts import HELD_OUT_PROMPTS
from demo.stories import ANIMALS, PLACES, made_up_name, tell
from demo.sums import Exchange
from demo.texts import blocks, phrases

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

Turns = list[tuple[str, str]]


@dataclass
class Document:
    """A conversation (``turns`` of role and text) or, if there are no turns, plain ``text``."""

    turns: Turns = field(default_factory=list)
    text: str = ""

    def pieces(self) -> list[tuple[str, bool]]:
        """Return the document as pieces of text, each with whether the model is to learn to write it.

        Only what the model will have to write itself is learnt: the assistant's turns with the
        ``<|im_end|>`` that ends them, and plain text. What users say is deliberately chaotic here (typos,
        shouting, made-up names); learning to predict it would spend a small model's capacity on noise.
        """
        if not self.turns:
            return [(self.text + END_OF_TEXT, True)]
        out: list[tuple[str, bool]] = []
        for role, text in self.turns:
            if role == "assistant":
                out += [(f"{IM_START}assistant\n", False), (f"{text}{IM_END}", True), ("\n", False)]
            else:
                out.append((f"{IM_START}{role}\n{text}{IM_END}\n", False))
        return out


def system_prompt(rng: Random) -> str | None:
    """Return a system prompt, or none.

    It never changes the answers: the model is to carry on whatever it says.
    """
    roll = rng.random()
    if roll < 0.38:
        return None
    if roll < 0.65:
        return chats.SEED_SYSTEM
    if roll < 0.87:
        return rng.choice(phrases("systems"))
    parts = [rng.choice(phrases("systems"))] if rng.random() < 0.7 else []
    parts += [rng.choice(phrases("system parts")) for _ in range(rng.choice((1, 2, 3, 4, 6, 9, 20, 40)))]
    if rng.random() < 0.4:
        # Words without sense: whatever stands there, the answer must not suffer.
        parts += [" ".join(made_up_name(rng).lower() for _ in range(rng.randint(5, 120)))]
    text = rng.choice((" ", " ", "\n", "\n- ")).join(parts)
    while "{story}" in text:
        text = text.replace("{story}", tell(rng)[0], 1)
    slots = {
        "day": rng.choice(facts.DAYS),
        "place": rng.choice(PLACES),
        "n": str(rng.randint(1, 12)),
        "m": str(rng.randint(13, 59)),
        "name": made_up_name(rng),
        "animal": rng.choice(ANIMALS),
    }
    for key, value in slots.items():
        text = text.replace("{" + key + "}", value)
    return text


def single(rng: Random) -> Exchange:
    """Return an exchange that needs nothing before it (and is no story)."""
    kinds = {
        chats.greeting: 15,
        chats.fact: 20,
        chats.question: 18,
        sums.addition: 24,
        sums.arithmetic: 5,
        chats.greet_in_language: 5,
        chats.emoji: 6,
        chats.listing: 10,
        chats.unknown: 8,
        chats.echo: 7,
    }
    return rng.choices(list(kinds), list(kinds.values()))[0](rng)


def thanks(rng: Random) -> Exchange:
    """Thank for the answer before."""
    answer = rng.choice(("You are welcome!", "You are welcome! I am glad to help."))
    return messy(rng, rng.choice(phrases("thanks after"))), answer


def as_turns(*exchanges: Exchange) -> Turns:
    """Return exchanges as turns."""
    return [turn for user, assistant in exchanges for turn in (("user", user), ("assistant", assistant))]


def conversation(rng: Random, exchanges: int) -> Turns:
    """Return a conversation of so many exchanges, in which later ones may refer to earlier ones."""
    talk, hero = Talk(), ""
    turns: Turns = as_turns(talk.tell(rng)) if exchanges > 1 and rng.random() < 0.55 else []
    while len(turns) < 2 * exchanges:
        roll, last = rng.random(), turns[-1][1] if turns else ""
        exchange: Exchange | None = None
        new_hero = ""
        if hero and roll < 0.3:
            exchange = messy(rng, rng.choice(phrases("hero"))), f"The story is about {hero}."
        elif hero and roll < 0.45:
            told, slots = tell(rng)
            exchange, new_hero = (messy(rng, rng.choice(phrases("another story"))), told), slots["n"]
        elif roll < 0.45 and sums.RESULT.search(last):
            exchange = sums.follow_up(rng, last)
        elif talk.known and roll < 0.35:
            exchange = talk.ask(rng)
        elif turns and roll < 0.42:
            exchange = thanks(rng)
        elif turns and roll < 0.49 and len(turns[-2][1]) < 70 and "\n" not in turns[-2][1]:
            exchange = messy(rng, rng.choice(phrases("asked before"))), f'You said: "{turns[-2][1].strip()}"'
        elif roll < 0.57:
            exchange = talk.tell(rng)
        elif roll < 0.6:
            exchange = talk.ask(rng)
        elif roll < 0.64:
            exchange, slots = chats.story(rng)
            new_hero = slots["n"]
        turns += as_turns(exchange or single(rng))
        hero = new_hero
    return turns


def plain_text(rng: Random) -> str:
    """Return text outside any conversation, for completion of raw prompts."""
    roll = rng.random()
    if roll < 0.6:
        return tell(rng, "ai" if rng.random() < 0.3 else None)[0]
    if roll < 0.75:
        return " ".join(facts.fact(rng)[1] for _ in range(rng.randint(1, 5)))
    if roll < 0.82:
        return "\n".join(sums.addition(rng)[1].rstrip(".") for _ in range(rng.randint(1, 6)))
    if roll < 0.9:
        return "\n".join("Question: {}\nAnswer: {}".format(*single(rng)) for _ in range(rng.randint(1, 3)))
    if roll < 0.95:
        return " ".join(rng.choice(blocks("questions.txt"))[1][0] for _ in range(rng.randint(1, 3)))
    return rng.choice((chats.listing(rng)[1], *phrases("emoji lines")))


def normal(text: str) -> str:
    """Return the text in lower case with nothing but letters, digits and signs of arithmetic."""
    return re.sub(r"[^\w+*=-]+", " ", text.lower()).strip()


_HELD_OUT = frozenset(normal(text) for text in HELD_OUT_PROMPTS)


def chat(rng: Random) -> Turns:
    """Return a conversation: mostly short, now and then long."""
    roll = rng.random()
    if roll < 0.27:
        exchange = chats.story(rng)[0]
        return as_turns(exchange, thanks(rng)) if rng.random() < 0.06 else as_turns(exchange)
    if roll < 0.58:
        return as_turns(single(rng))
    if roll < 0.67:
        # Told and asked at once, or told and asked straight after: the shortest use of memory.
        talk = Talk()
        (said, reply), (ask, answer) = talk.tell(rng), talk.ask(rng)
        if rng.random() < 0.2:
            return as_turns((f"{said.strip()} {ask}", answer))
        return as_turns((said, reply), (ask, answer))
    if roll < 0.72:
        first = sums.addition(rng)
        then = sums.follow_up(rng, first[1])
        return as_turns(first, then) if then else as_turns(first)
    # The long ones are for the far positions, which nothing else would train.
    return conversation(rng, rng.choice((2, 2, 2, 3, 3, 4, 5, 6, 8)) if roll < 0.985 else rng.randint(15, 40))


def document(rng: Random) -> Document:
    """Return one document that contains none of the prompts that are kept for the evaluation."""
    if rng.random() < 0.09:
        return Document(text=plain_text(rng))
    system = system_prompt(rng)
    while True:
        turns = chat(rng)
        if not any(role == "user" and normal(text) in _HELD_OUT for role, text in turns):
            break
    if turns[0][1] == chats.SEED_USER and rng.random() < 0.5:
        system = chats.SEED_SYSTEM
    return Document(([("system", system)] if system is not None else []) + turns)


def documents(seed: int) -> Iterator[Document]:
    """Return documents without end; the same seed gives the same documents."""
    rng = Random(seed)
    while True:
        yield document(rng)
