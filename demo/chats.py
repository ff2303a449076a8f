"""Single exchanges: what a user may say, in many phrasings, and what the demo model answers.

Every function takes a ``Random`` and returns ``(user, assistant)``. The user's side is varied widely, the
assistant's side is kept nearly fixed: a model this small, sampled at temperature 1, is only as steady as
the text it learnt from.
"""

from __future__ import annotations

from random import Random

from demo import facts
from demo.manners import messy
from demo.stories import AI_NAMES, ANIMALS, PET_NAMES, TOPICS, made_up_name, tell
from demo.sums import NUMBER_WORDS, Exchange
from demo.texts import blocks, named, pairs, phrases, words

DONT_KNOW = "I am only a tiny demo model, so I do not know that."
CANNOT_DO = "I am only a tiny demo model, so I cannot do that."

# The request that the whole project is demonstrated with.
SEED_SYSTEM = "You are a helpful assistant."
SEED_USER = "Write a short story about AI, in 100 words."

EMOJI, HELLO, THANKS, FOREIGN = pairs("emoji"), pairs("hello"), pairs("thanks"), pairs("foreign greetings")
LISTS = named("some ")

# Blocks of greetings that are drawn more often: hello, how are you, thank you, goodbye.
_OFTEN = (0, 0, 0, 0, 1, 2, 3, 6, 6, 7, 7, 8, 8)

_WHOLE_LISTS = {
    "days": facts.DAYS,
    "months": facts.MONTHS,
    "alphabet": facts.ALPHABET,
    "seasons": ["Spring", "summer", "autumn", "winter"],
    "planets": list(LISTS["planets"]),
    "rainbow": ["Red", "orange", "yellow", "green", "blue", "indigo", "violet"],
    "continents": ["Africa", "Antarctica", "Asia", "Australia", "Europe", "North America", "South America"],
    "primary colors": ["Red", "yellow", "blue"],
}


def a_or_an(word: str) -> str:
    """Return the article that goes with a word."""
    return "an" if word[0].lower() in "aeiou" else "a"


def greeting(rng: Random) -> Exchange:
    """Greet, thank, take leave and the like."""
    groups = blocks("greetings.txt")
    asks, answers = groups[rng.choice((*_OFTEN, *range(len(groups))))]
    return messy(rng, rng.choice(asks)), rng.choice(answers)


def fact(rng: Random) -> Exchange:
    """Ask for a fact out of a table."""
    text, answer = facts.fact(rng)
    return messy(rng, text), answer


def question(rng: Random) -> Exchange:
    """Ask one of the questions that stand alone."""
    asks, answers = rng.choice(blocks("questions.txt"))
    return messy(rng, rng.choice(asks)), rng.choice(answers)


def greet_in_language(rng: Random) -> Exchange:
    """Say hello or thank you in another language, or be greeted in one."""
    roll = rng.random()
    if roll < 0.6:
        language = rng.choice(list(HELLO))
        text = rng.choice(phrases("hello in"))
        return messy(rng, text.replace("{x}", language)), f"Hello in {language} is: {HELLO[language]}"
    if roll < 0.85:
        language = rng.choice(list(THANKS))
        text = rng.choice(phrases("thanks in"))
        return messy(rng, text.replace("{x}", language)), f"Thank you in {language} is: {THANKS[language]}"
    word = rng.choice(list(FOREIGN))
    return word + rng.choice(("", "", "!", ".")), FOREIGN[word]


def emoji(rng: Random) -> Exchange:
    """Send an emoji, or a line with emoji in it."""
    roll = rng.random()
    if roll < 0.65:
        x = rng.choice(list(EMOJI))
        text = rng.choice(phrases("emoji of")).replace("{x}", x).replace("{a}", a_or_an(x))
        return messy(rng, text), f"Here you are: {EMOJI[x]}"
    if roll < 0.82:
        return messy(
            rng, rng.choice(phrases("any emoji"))
        ), f"Here you are: {rng.choice(list(EMOJI.values()))}"
    return messy(rng, rng.choice(phrases("emoji line"))), rng.choice(phrases("emoji lines"))


def counting(rng: Random) -> Exchange:
    """Count up or down."""
    roll = rng.random()
    if roll < 0.48:
        a, b = 1, rng.choice((10, 10, 5, 20, rng.randint(2, 30)))
        text = rng.choice(phrases("count to"))
        text = text.replace("{x}", NUMBER_WORDS[b] if b <= 20 and rng.random() < 0.25 else str(b))
    elif roll < 0.86:
        a = rng.randint(0, 20) if rng.random() < 0.7 else rng.randint(20, 80)
        b = a + rng.randint(2, 16)
        text = rng.choice(phrases("count from")).replace("{a}", str(a)).replace("{b}", str(b))
    else:
        a = rng.choice((10, 10, 5, 3, rng.randint(3, 20)))
        text = rng.choice(phrases("count down")).replace("{a}", str(a))
        return messy(rng, text), ", ".join(map(str, range(a, 0, -1)))
    return messy(rng, text), ", ".join(map(str, range(a, b + 1)))


def listing(rng: Random) -> Exchange:
    """Count, recite a list, or give a few examples of something."""
    roll = rng.random()
    if roll < 0.47:
        return counting(rng)
    if roll < 0.7:
        kind = rng.choice(list(_WHOLE_LISTS))
        end = "" if kind == "alphabet" else "."
        return messy(rng, rng.choice(phrases("list " + kind))), ", ".join(_WHOLE_LISTS[kind]) + end
    kind = rng.choice(("colors", "animals", "fruits", *LISTS))
    items = LISTS[kind]
    n = rng.choice((3, 3, 3, 2, 4, 5))
    x = NUMBER_WORDS[n] if rng.random() < 0.7 else str(n)
    if rng.random() < 0.12:
        n, x = 3, "some"
    # The order is fixed and only the beginning is free, so that the model cannot name anything twice.
    start = rng.randrange(len(items))
    chosen = [items[(start + i) % len(items)] for i in range(min(n, len(items)))]
    answer = ", ".join(chosen[:-1]) + " and " + chosen[-1] + "."
    text = rng.choice(phrases("name some")).replace("{x}", x).replace("{k}", kind)
    return messy(rng, text), answer[0].upper() + answer[1:]


def unknown(rng: Random) -> Exchange:
    """Ask for what the model does not know or cannot do; the answer says so."""
    kind, answer = ("unknown", DONT_KNOW) if rng.random() < 0.65 else ("cannot", CANNOT_DO)
    text = rng.choice(phrases(kind))
    slots = {
        "place": rng.choice(words("far places")),
        "place2": rng.choice(words("far places")),
        "event": rng.choice(words("events")),
        "name": rng.choice(words("famous"))
        if rng.random() < 0.7
        else f"{made_up_name(rng)} {made_up_name(rng)}",
        "thing": rng.choice(words("things")),
        "subject": rng.choice(words("subjects")),
        "subject2": rng.choice(words("subjects")),
        "year": str(rng.randint(1000, 2030)),
        "word": rng.choice(words("rare words")) if rng.random() < 0.6 else made_up_name(rng).lower(),
        "big": str(rng.randint(101, 99999)),
        "big2": str(rng.randint(101, 9999)),
        "made": made_up_name(rng) + rng.choice(("ia", "land", "stan", "")),
        "language": rng.choice(list(HELLO)),
    }
    for key, value in slots.items():
        text = text.replace("{" + key + "}", value)
    return messy(rng, text), answer


def echo(rng: Random) -> Exchange:
    """Repeat what the user says: the same copying that is needed for remembering names."""
    x = rng.choice(words("echo words"))
    if rng.random() < 0.65:
        pool = [*words("echo words"), *words("rare words"), *ANIMALS, *NUMBER_WORDS]
        said = " ".join(rng.choice(pool) for _ in range(rng.randint(1, 3))).split(" ")
        for _ in range(rng.randint(0, 2)):
            name = made_up_name(rng)
            said.append(name.lower() if rng.random() < 0.5 else name)
        rng.shuffle(said)
        x = " ".join(said[:8])
    return rng.choice(phrases("echo")).replace("{x}", x), x


def story(rng: Random) -> tuple[Exchange, dict[str, str]]:
    """Ask for a story; also returns what its slots were filled with, for questions about it afterwards."""
    roll = rng.random()
    length = rng.choice(("100", "100", "a hundred", "120", "80", "90", "150", "60", "50"))
    short = length in ("50", "60")
    if roll < 0.18:
        text, slots = tell(rng, "ai")
        return (SEED_USER, text), slots
    if roll < 0.27:
        ask = rng.choice(phrases("any story"))
        text, slots = tell(rng, None, short and "{k}" in ask)
        return (messy(rng, ask.replace("{k}", length)), text), slots
    topic = "ai" if roll < 0.47 else rng.choice((*TOPICS, *rng.sample(ANIMALS, 4)))
    if topic in TOPICS:
        about = TOPICS[topic][0] if rng.random() < 0.35 else rng.choice(TOPICS[topic])
    else:
        about = rng.choice(("", "", "", "little ", "young ", "brave ", "small ", "lost ")) + topic
        about = f"{a_or_an(about)} {about}"
    ask = rng.choice(phrases("story about"))
    hero = None
    if rng.random() < 0.4:
        # A name that the reader gives is mostly invented, so it cannot be guessed: the model has to look
        # back for it in every sentence, and what it learns by that keeps the names together in all other
        # stories as well.
        hero = (
            made_up_name(rng) if rng.random() < 0.7 else rng.choice(AI_NAMES if topic == "ai" else PET_NAMES)
        )
        about += rng.choice((" named ", " called ", " with the name ")) + hero
    text, slots = tell(rng, topic, short and "{k}" in ask, hero)
    return (messy(rng, ask.replace("{k}", length).replace("{t}", about)), text), slots
