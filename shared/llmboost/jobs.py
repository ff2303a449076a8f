"""What is asked: one request for generated text, as it travels from an API pod to a worker.

Plain data, no behaviour. `llmboost.streams` holds what comes back.
"""

import hashlib
import re
import secrets
import time
import zlib
from typing import Any, Literal

import msgspec

JobClass = Literal["interactive", "batch"]
JOB_CLASSES: tuple[JobClass, ...] = ("interactive", "batch")
"""In the order in which they are claimed."""

FUNCTION = "generate"
"""Name of the arq function that runs a `GenerationJob`."""


GrammarKind = Literal["json", "json_schema", "regex", "choice", "grammar"]


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What the whole output is to be, in words that belong to no library."""

    kind: GrammarKind
    value: str = ""
    """json: nothing, any object will do. json_schema: the schema, as JSON. regex: a pattern of the whole
    output. choice: a JSON list of strings, one of which is the output. grammar: a context-free one, in GBNF
    or Lark."""
    param: str = ""
    """What the client calls it; errors name it."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn; one object for all choices of a request.

    Defaults are OpenAI's. Ranges are checked where a request enters the system, not here.
    """

    n: int = 1
    """Choices per prompt; choice `i` draws from its own stream of random numbers."""
    seed: int = 0
    """64-bit seed. A token is drawn from (seed, choice, position), so a resumed sequence repeats it."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output, as in transformers."""
    logit_bias: dict[int, float] = {}
    max_tokens: int | None = None
    """None: as many as the context has room for."""
    min_tokens: int = 0
    """No end-of-sequence token and no stop before this many."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    top_logprobs: int | None = None
    """None: no logprobs. 0: of the drawn token alone. k: of the k most likely tokens too."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    grammar: Grammar | None = None
    """Only tokens are drawn that lead to such an output, and the end only where it is one."""


class Prompt(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to continue; exactly one of `messages`, `text` and `token_ids` is set."""

    messages: list[dict[str, Any]] | None = None
    """A chat in OpenAI's form; the worker renders it with the model's template."""
    text: str | None = None
    token_ids: list[int] | None = None
    add_special_tokens: bool = True
    """With `text`: whether the tokenizer adds its own (false for text that a template rendered)."""


class GenerationJob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request: one stream, one terminal entry."""

    id: str
    """The id the client sees; also the arq job's id and the name of the stream."""
    model: str
    """The queue to put it into: a model's own name, aliases resolved."""
    prompt: Prompt
    sampling: SamplingParams
    job_class: JobClass = "interactive"
    needs_audience: bool = True
    """False: generate even when nobody reads (background and batch work)."""
    echo: bool = False
    """The stream begins with the prompt's text. With `max_tokens=0` that is all of it."""
    owner: str = ""
    """Fingerprint of the API key that made it; other keys can't see the stream."""
    created: float
    """Unix time in seconds."""
    deadline: float
    """Unix time in seconds at which the stream is sealed whatever its state."""


def new_id(prefix: str) -> str:
    """A fresh id such as `chatcmpl-6a4f…` or, for a prefix with its own sign at the end, `resp_6a4f…`;
    unguessable, though no credential.

    After the prefix: the time (8 hex digits), 80 random bits (20), and a checksum of all that (4).
    """
    return _id(prefix, time.time(), secrets.token_hex(10))


def derived_id(prefix: str, parent: str, *parts: int | str) -> str:
    """An id of the same form and time as its parent's, the same each time for the same parent and parts.

    Raises:
        ValueError: the parent is no id of `new_id`'s.
    """
    made = made_at(parent)
    if made is None:
        raise ValueError(f"{parent!r} is not an id made here")
    return _id(prefix, made, _digest(10, parent, *parts))


def derived_seed(job_id: str) -> int:
    """The seed of a request that names none: every attempt draws the same, and so does whoever makes the same
    job again."""
    return int(_digest(8, job_id, "seed"), 16) >> 1


def _digest(size: int, *parts: int | str) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=size).hexdigest()


def _id(prefix: str, made: float, digits: str) -> str:
    unchecked = f"{stem(prefix)}{int(made):08x}{digits}"
    return unchecked + _checksum(unchecked)


def stem(prefix: str) -> str:
    """What ids with this prefix begin with."""
    return prefix if prefix.endswith("_") else f"{prefix}-"


def is_id(text: str, prefix: str) -> bool:
    """Whether it was made here, with this prefix."""
    return text.startswith(stem(prefix)) and made_at(text) is not None


def made_at(new: str) -> float | None:
    """Unix time (s) at which `new_id` made an id; None if it did not.

    So an id whose stream is gone can be told from one that never had a stream, though nothing is kept.
    """
    match = re.fullmatch(r"[a-z]+[-_]([0-9a-f]{8})[0-9a-f]{24}", new)
    if match is None or _checksum(new[:-4]) != new[-4:]:
        return None
    return float(int(match[1], 16))


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()) & 0xFFFF:04x}"


def new_seed() -> int:
    """A seed for a request that names none and is made once."""
    return secrets.randbits(63)


def now() -> float:
    """Unix time in seconds."""
    return time.time()


class OpaqueJob:
    """A job on its way through arq, which logs its arguments: prompts must not reach a log that way."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __repr__(self) -> str:
        return f"<job, {len(self.data)} bytes>"

    def decode(self) -> GenerationJob:
        """Raises `msgspec.ValidationError` for a job of another version or none at all."""
        return _decoder.decode(self.data)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(GenerationJob)


def encode(job: GenerationJob) -> bytes:
    """The job as msgpack."""
    return _encoder.encode(job)
