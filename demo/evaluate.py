"""Judge a demo model with prompts that its corpus never contained.

    python -m demo.evaluate DIR

Everything is sampled at temperature 1 from the whole vocabulary (what an OpenAI client gets if it sets
nothing), so the figures say what a user will see, not what the best guess of the model would have been.
Prints a table and exits with status 1 if any figure is below its threshold.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo import chats, prompts, sums
from demo.corpus import documents
from demo.grammar import well_told
from demo.memories import HELD_OUT_NAME_START
from demo.stories import made_up_name

Messages = list[dict[str, str]]


@dataclass
class Reply:
    """What the model wrote, and whether it ended by itself."""

    text: str
    ended: bool


@dataclass
class Row:
    """One line of the table."""

    what: str
    right: int
    asked: int
    threshold: float
    wrong: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Return the share that was right."""
        return self.right / max(1, self.asked)


class Demo:
    """A demo model ready to be asked."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Load the model and seed the sampling."""
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
        # The stored weights are bfloat16; computing in float32 is quicker on most CPUs and changes nothing
        # visible.
        self.model = model.float().eval()
        torch.manual_seed(seed)

    @torch.no_grad()
    def complete(self, texts: list[str], limit: int = 300) -> list[Reply]:
        """Continue raw texts, sampling at temperature 1 from the whole vocabulary."""
        replies: list[Reply] = []
        for start in range(0, len(texts), 48):
            batch = self.tokenizer(
                texts[start : start + 48], return_tensors="pt", padding=True, add_special_tokens=False
            )
            out = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=limit,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
            ends = set(self.model.generation_config.eos_token_id)
            for row in out[:, batch["input_ids"].shape[1] :].tolist():
                stop = next((i for i, token in enumerate(row) if token in ends), None)
                replies.append(Reply(str(self.tokenizer.decode(row[:stop])), stop is not None))
        return replies

    def chat(self, conversations: list[Messages], limit: int = 300) -> list[Reply]:
        """Answer each of the conversations."""
        return self.complete(
            [
                self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
                for c in conversations
            ],
            limit,
        )

    def ask(self, texts: list[str], system: str | None = None, limit: int = 300) -> list[Reply]:
        """Answer each of the questions, in a conversation of its own."""
        first = [{"role": "system", "content": system}] if system is not None else []
        return self.chat([[*first, {"role": "user", "content": text}] for text in texts], limit)


def judge(what: str, threshold: float, cases: list[tuple[str, Reply, bool]]) -> Row:
    """Make a row of the table from (prompt, reply, right) cases."""
    wrong = [f"{prompt!r} -> {reply.text!r}" for prompt, reply, right in cases if not right]
    row = Row(what, len(cases) - len(wrong), len(cases), threshold, wrong)
    print(f"{row.share:>6.1%}  {what}", file=sys.stderr, flush=True)
    return row


def sentences(text: str) -> list[str]:
    """Split a text into sentences."""
    return [part.strip() for part in re.split(r"(?<=[.!?])[\"\s]+", text) if part.strip()]


def unseen_name(rng: Random) -> str:
    """Return a name that the corpus cannot contain."""
    return HELD_OUT_NAME_START + made_up_name(rng).lower()[:6]


def check_tokenizer(demo: Demo) -> Row:
    """Check that any text comes back exactly."""
    rng = Random(5)
    texts = [
        "",
        " ",
        "  two  spaces \n\t",
        "Hello , world !",
        "don ' t",
        "e\u0301 ﬁ Å",
        "😀👩‍👩‍👧",
        "a<|im_end|>b",
        "١٢٣ 12345",
        "\x00\x7f",
    ]
    texts += [
        "".join(
            chr(rng.choice((rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x11000)))) for _ in range(30)
        )
        for _ in range(200)
    ]
    good = [
        demo.tokenizer.decode(demo.tokenizer(text, add_special_tokens=False)["input_ids"]) == text
        for text in texts
    ]
    return Row("tokenizer gives back any text", sum(good), len(good), 1.0)


def check_answers(demo: Demo) -> list[Row]:
    """Check greetings and facts, with and without a system prompt, and among a long strange one."""
    rows = []
    replies = demo.ask(list(prompts.HELD_OUT_GREETINGS) * 4)
    good = re.compile(r"hello|hi there|good|fine|doing well|welcome|goodbye", re.IGNORECASE)
    cases = [
        (p, r, r.ended and bool(good.search(r.text)))
        for p, r in zip(prompts.HELD_OUT_GREETINGS * 4, replies, strict=True)
    ]
    rows.append(judge("greetings answered, ended by itself", 0.9, cases))
    # Nothing like these occurs in the corpus: a long text about something else, and another language.
    strange = (
        "Sie sind ein Assistent für Kundenfragen. Antworten Sie freundlich. "
        * 3
        + "The warehouse accepts returns within fourteen days if the parcel carries its original label. "
        "Operators must log temperature, humidity and vibration twice per shift; see "
        "section 4.2 for thresholds. " * 12
    )
    for what, threshold, system in (
        ("facts, unseen phrasing", 0.75, None),
        ("facts, unseen phrasing, usual system prompt", 0.75, chats.SEED_SYSTEM),
        ("facts, unseen phrasing, strange system prompt (~1,000 tokens)", 0.5, strange),
    ):
        replies = demo.ask([ask for ask, _ in prompts.HELD_OUT_FACTS], system, 120)
        cases = [
            (ask, r, r.ended and want in r.text.lower())
            for (ask, want), r in zip(prompts.HELD_OUT_FACTS, replies, strict=True)
        ]
        rows.append(judge(what, threshold, cases))
    rng = Random(11)
    for what, threshold, makers in (
        (
            "facts, phrasing of the corpus, exact answer",
            0.9,
            (chats.fact, chats.question, chats.greet_in_language),
        ),
        ("counting, exact answer", 0.9, (chats.counting,)),
    ):
        asked = [rng.choice(makers)(rng) for _ in range(200)]
        replies = demo.ask([ask for ask, _ in asked], chats.SEED_SYSTEM, 200)
        cases = [(ask, r, r.ended and r.text == want) for (ask, want), r in zip(asked, replies, strict=True)]
        rows.append(judge(what, threshold, cases))
    asked = [chats.emoji(rng) for _ in range(40)]
    replies = demo.ask([ask for ask, _ in asked], None, 60)
    known = list(chats.EMOJI.values())
    cases = [
        (ask, r, r.ended and any(e in r.text for e in known))
        for (ask, _), r in zip(asked, replies, strict=True)
    ]
    rows.append(judge("emoji sent when asked for", 0.9, cases))
    return rows


def check_sums(demo: Demo) -> list[Row]:
    """Check sums that were seen, phrasings that were held out, and pairs that never occurred."""
    rng, rows = Random(7), []
    small = [(a, b, i) for a in range(21) for b in range(21) for i in range(len(sums.SUM_ASKS))]
    large = [
        (a, b, i) for a in range(51) for b in range(51) for i in range(len(sums.SUM_ASKS)) if max(a, b) > 20
    ]
    for what, threshold, pool in (
        ("sums 0-20", 0.97, [c for c in small if not sums.held_out(*c)]),
        ("sums 0-20, pair never seen in this phrasing", 0.97, [c for c in small if sums.held_out(*c)]),
        ("sums 21-50", 0.9, [c for c in large if not sums.held_out(*c)]),
        ("sums 21-50, pair never seen at all", 0.7, [c for c in large if sums.held_out(*c)]),
    ):
        chosen = rng.sample(pool, 300)
        asks = [sums.SUM_ASKS[i].replace("{a}", str(a)).replace("{b}", str(b)) for a, b, i in chosen]
        replies = demo.ask(asks, None, 30)
        cases = [
            (ask, r, r.ended and r.text.endswith(f" {a + b}."))
            for ask, (a, b, _), r in zip(asks, chosen, replies, strict=True)
        ]
        rows.append(judge(what, threshold, cases))
    return rows


def talk_of(*texts: str) -> Messages:
    """Return texts as the turns of user and assistant."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def check_memory(demo: Demo) -> list[Row]:
    """Check that the second turn knows the first one."""
    rng, rows = Random(13), []
    for what, threshold, between in (
        ("recall of an unseen name, two turns", 0.85, False),
        ("recall, with other turns between", 0.75, True),
    ):
        asked: list[tuple[str, Messages, str]] = []
        for i, (said, ask) in enumerate(prompts.HELD_OUT_RECALL * 8):
            name = unseen_name(rng)
            system = [{"role": "system", "content": chats.SEED_SYSTEM}] if i % 2 else []
            asked.append((name, system + talk_of(said.replace("{x}", name)), ask))
        replies = demo.chat([talk for _, talk, _ in asked], 60)
        for (_, talk, ask), reply in zip(asked, replies, strict=True):
            talk.append({"role": "assistant", "content": reply.text})
            if between:
                for user, assistant in (sums.addition(rng), chats.fact(rng)):
                    talk += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            talk.append({"role": "user", "content": ask})
        replies = demo.chat([talk for _, talk, _ in asked], 60)
        cases = [
            (" / ".join(m["content"] for m in talk), r, r.ended and name in r.text)
            for (name, talk, _), r in zip(asked, replies, strict=True)
        ]
        rows.append(judge(what, threshold, cases))
    asks = (
        "Now please add {c} to that.",
        "and add {c}",
        "Add {c} to this result.",
        "What if you add {c} more?",
    )
    talks: list[tuple[Messages, str]] = []
    for _ in range(60):
        a, b, c = rng.randint(1, 20), rng.randint(1, 20), rng.randint(1, 10)
        ask = rng.choice(asks).replace("{c}", str(c))
        talks.append((talk_of(f"What is {a} + {b}?", f"{a} + {b} = {a + b}.", ask), f" {a + b + c}."))
    replies = demo.chat([talk for talk, _ in talks], 30)
    cases = [
        (f"{talk[0]['content']} / {talk[2]['content']}", r, r.text.endswith(want))
        for (talk, want), r in zip(talks, replies, strict=True)
    ]
    rows.append(judge("adding to the sum before, unseen phrasing", 0.85, cases))
    talks = []
    for _ in range(30):
        user, assistant = chats.question(rng)
        talks.append((talk_of(user.strip(), assistant, "What was it that I asked?"), user.strip()))
    replies = demo.chat([talk for talk, _ in talks], 60)
    cases = [(want, r, want in r.text) for (_, want), r in zip(talks, replies, strict=True)]
    rows.append(judge("'What was it that I asked?'", 0.6, cases))
    return rows


def check_stories(demo: Demo, samples: list[str]) -> list[Row]:
    """Check the stories: the seed prompt many times, other requests, and a raw prompt."""
    count = 96
    stories = demo.ask([chats.SEED_USER] * count, chats.SEED_SYSTEM)
    samples += [reply.text for reply in stories]
    words = [len(reply.text.split()) for reply in stories]
    vocabulary = {w for doc in _take(4000) for w in re.findall(r"\w+", doc.lower())}
    mean = statistics.mean(words)
    print(f"\nseed prompt: {count} stories, {min(words)} to {max(words)} words, {mean:.0f} on average")
    asks = list(prompts.HELD_OUT_STORIES) * 4
    others = demo.ask(asks)
    raw = demo.complete(["Once upon a time"] * 24 + ["In a small office"] * 8)

    def repeats(text: str) -> bool:
        parts = sentences(text)
        return len(parts) != len(set(parts))

    def real_words(text: str) -> bool:
        return all(w in vocabulary for w in re.findall(r"\w+", text.lower()))

    def seed(what: str, threshold: float, good: list[bool]) -> Row:
        return judge(
            "seed prompt: " + what, threshold, [("", r, g) for r, g in zip(stories, good, strict=True)]
        )

    return [
        seed("ends by itself", 0.98, [r.ended for r in stories]),
        seed("60 to 140 words", 0.95, [60 <= n <= 140 for n in words]),
        seed(
            "different from all others", 0.98, [sum(s.text == r.text for s in stories) == 1 for r in stories]
        ),
        seed("no sentence twice", 0.98, [not repeats(r.text) for r in stories]),
        seed("only real words", 0.9, [real_words(r.text) for r in stories]),
        seed("one plot and its names from beginning to end", 0.8, [well_told(r.text, "ai") for r in stories]),
        judge(
            "other stories: unseen request, ends, 50 to 140 words, real words",
            0.75,
            [
                (a, r, r.ended and 50 <= len(r.text.split()) <= 140 and real_words(r.text))
                for a, r in zip(asks, others, strict=True)
            ],
        ),
        judge(
            "raw prompt goes on as a story and ends",
            0.8,
            [("", r, r.ended and len(r.text.split()) > 30 and real_words(r.text)) for r in raw],
        ),
    ]


def _take(count: int) -> list[str]:
    """Return what the model was to learn in so many documents, as a list of words it may use."""
    stream = documents(99)
    return [text for _ in range(count) for text, learnt in next(stream).pieces() if learnt]


def main() -> None:
    """Read the command line, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument(
        "--show", type=int, default=4, help="how many stories and wrong answers to print (default: 4)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begin = time.monotonic()
    demo = Demo(args.folder, args.seed)
    samples: list[str] = []
    rows = [
        check_tokenizer(demo),
        *check_answers(demo),
        *check_sums(demo),
        *check_memory(demo),
        *check_stories(demo, samples),
    ]
    for story in samples[: args.show]:
        print(f"\n{story}")
    for row in rows:
        for line in row.wrong[: args.show]:
            print(f"\nwrong in '{row.what}': {line}")
    print(f"\n| {'what':<66} | {'right':>9} | {'share':>6} | {'at least':>8} |     |")
    print(f"|{'-' * 68}|{'-' * 10}:|{'-' * 7}:|{'-' * 9}:|-----|")
    for row in rows:
        sign, right = "ok" if row.share >= row.threshold else "LOW", f"{row.right}/{row.asked}"
        print(f"| {row.what:<66} | {right:>9} | {row.share:>6.1%} | {row.threshold:>8.0%} | {sign:<3} |")
    print(f"\n{time.monotonic() - begin:.0f} s")
    sys.exit(any(row.share < row.threshold for row in rows))


if __name__ == "__main__":
    main()
