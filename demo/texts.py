"""Read the text files in ``demo/text``: all the wording of the corpus is there, and none of the logic."""

from __future__ import annotations

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "text"


def lines(file: str) -> list[str]:
    r"""Return the lines of a file without its comments; ``\n`` in a line stands for a line break."""
    found = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    return [line.strip().replace("\\n", "\n") for line in found if not line.startswith("# ")]


@cache
def sections(file: str) -> list[tuple[str, list[str]]]:
    """Return what stands under each ``== name``, empty lines included; a name may occur more than once."""
    out: list[tuple[str, list[str]]] = []
    for line in lines(file):
        if line.startswith("== "):
            out.append((line[3:], []))
        elif out:
            out[-1][1].append(line)
    return out


@cache
def phrases(name: str) -> tuple[str, ...]:
    """Return a list of ``phrases.txt``."""
    return tuple(line for line in dict(sections("phrases.txt"))[name] if line)


@cache
def words(name: str) -> tuple[str, ...]:
    """Return a list of ``words.txt``."""
    return tuple(
        word.strip() for line in dict(sections("words.txt"))[name] for word in line.split(",") if word.strip()
    )


@cache
def pairs(name: str) -> dict[str, str]:
    """Return a list of ``words.txt`` whose items are pairs."""
    return dict(item.split(" = ") for item in words(name))


def named(prefix: str) -> dict[str, tuple[str, ...]]:
    """Return all lists of ``words.txt`` whose names begin with ``prefix``."""
    found = [name for name, _ in sections("words.txt") if name.startswith(prefix)]
    return {name.removeprefix(prefix): words(name) for name in found}


@cache
def blocks(file: str) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Return the blocks of a file: what may be said, and what may be answered."""
    out: list[tuple[list[str], list[str]]] = [([], [])]
    for line in lines(file):
        if line.startswith("> "):
            out[-1][1].append(line[2:])
        elif line:
            out[-1][0].append(line)
        elif out[-1][1]:
            out.append(([], []))
    return tuple((tuple(asks), tuple(answers)) for asks, answers in out if asks)
