"""Who is measured: the model, the endpoint, and which fields of a request the server takes."""

from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from llmboost.cli.bench.client import Client
from llmboost.cli.bench.events import message_in
from llmboost.cli.bench.options import Options
from llmboost.cli.bench.record import Record
from llmboost.cli.bench.wire import WireError
from llmboost.cli.bench.words import words

PATHS = {"completions": "/completions", "chat": "/chat/completions"}
OPTIONAL = {
    "ignore_eos": "answers may be shorter than asked for",
    "stream_options": "tokens are counted as chunks, if it does not count them of itself",
    "temperature": "its own default is used",
}
"""Fields that some servers refuse, and what it means that they are then left out."""
_ABSENT = (404, 405, 501)
_REFUSED = (400, 422)
_HIGHEST_IDS = (20_000, 1_000)
"""Vocabularies are at least one of them large; ids below `LOWEST_ID` are often special."""
LOWEST_ID = 100
_FEW_WORDS, _MANY_WORDS = 16, 144


class TargetError(Exception):
    """The server can't be measured; `str()` says why and what to do."""


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(frozen=True, slots=True)
class Target:
    """How to ask this server."""

    model: str
    endpoint: str
    max_model_len: int | None = None
    highest_id: int | None = None
    """Prompts are token ids up to here. None: prompts are text."""
    tokens_per_word: float = 1.0
    """Of text, beside `tokens_around`, which a template adds."""
    tokens_around: float = 0.0
    refused: frozenset[str] = frozenset()
    """Fields that it does not take."""
    length_field: str = "max_tokens"
    notes: tuple[str, ...] = field(default=())
    """What a reader of the figures should know."""

    @property
    def path(self) -> str:
        return PATHS[self.endpoint]

    def body(self, prompt: Any, max_tokens: int, temperature: float, options: Options) -> dict[str, Any]:
        """A request for one streamed answer. `prompt`: text, ids, or messages in chats."""
        key = "messages" if self.endpoint == "chat" else "prompt"
        if self.endpoint == "chat" and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        body: dict[str, Any] = {
            "model": self.model,
            key: prompt,
            self.length_field: max_tokens,
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        for name in self.refused:
            body.pop(name, None)
        return body | dict(options.extra_body or {})


async def find(client: Client, options: Options, *, messages: bool) -> Target:
    """Asks the server what it is, in a few short requests. `messages`: prompts are chats, not made up here.

    Raises:
        TargetError: it is not reachable, or answers no request.
    """
    try:
        return await _Search(client, options, messages).run()
    except WireError as error:
        advice = (
            "start one: llmboost serve, or give its URL"
            if error.kind == "no connection"
            else "is it the right URL?"
        )
        raise TargetError(f"no server at {options.url}: {error} ({advice})") from None


class _Search:
    def __init__(self, client: Client, options: Options, messages: bool) -> None:
        self._client = client
        self._options = options
        self._messages = messages
        self._target: Target

    async def run(self) -> Target:
        model = await self._model()
        endpoints = [self._options.endpoint]
        if self._options.endpoint == "auto":
            endpoints = ["chat"] if self._messages else ["completions", "chat"]
        for endpoint in endpoints:
            self._target = Target(model.id, endpoint, model.max_model_len)
            record = await self._probe(words(_FEW_WORDS))
            if record.error is None:
                break
            if record.status not in _ABSENT or endpoint == endpoints[-1]:
                raise TargetError(self._refusal(record.status, f"{record.error}: {record.message}"))
        if self._options.input is None:
            await self._measure_prompts()
        return self._target

    async def _model(self) -> _Model:
        wanted = self._options.model
        status, body = await self._client.get("/models")
        if status in (401, 403):
            raise TargetError(self._refusal(status, message_in(body)))
        try:
            models = msgspec.json.decode(body, type=_Models).data if status == 200 else []
        except (msgspec.DecodeError, UnicodeDecodeError):
            models = []
        for model in models:
            if wanted in (None, model.id):
                return model
        if wanted is not None:
            return _Model(wanted)  # whether it is there is said by the answer to the first request
        url = f"{self._options.url}/models"
        if status == 200:
            raise TargetError(f"{url} lists no model: wait until one is loaded, or name one with --model")
        raise TargetError(
            f"{url} is answered with status {status}: is it the right URL? --model names a model"
        )

    async def _probe(self, prompt: Any) -> Record:
        """A short request, without the fields that the server refuses by name."""
        while True:
            target = self._target
            body = target.body(prompt, 1, self._options.temperatures[0], self._options)
            record = await self._client.stream(target.path, body)
            if record.status not in _REFUSED or not self._yield_to(record.message):
                return record

    def _yield_to(self, message: str) -> bool:
        """Leaves out what the message names, if that may help."""
        target = self._target
        if "max_completion_tokens" in message and target.length_field == "max_tokens":
            self._target = replace(target, length_field="max_completion_tokens")
            return True
        for name, consequence in OPTIONAL.items():
            if name in message and name not in target.refused:
                note = f"the server does not take {name}: {consequence}"
                self._target = replace(target, refused=target.refused | {name}, notes=(*target.notes, note))
                return True
        return False

    async def _measure_prompts(self) -> None:
        """Finds out how to make a prompt of so many tokens."""
        if self._target.endpoint == "completions":
            for highest in _HIGHEST_IDS:
                # The highest one too: a server with a smaller vocabulary must say so now.
                ids = [LOWEST_ID, *range(highest - 6, highest + 1)]
                record = await self._probe(ids)
                if record.error is None and record.prompt_tokens in (0, len(ids), len(ids) + 1):
                    self._target = replace(self._target, highest_id=highest)
                    return
        few, many = [await self._probe(words(count)) for count in (_FEW_WORDS, _MANY_WORDS)]
        if not few.prompt_tokens or many.prompt_tokens <= few.prompt_tokens:
            note = "the server does not count a prompt's tokens: a word is taken for one"
            self._target = replace(self._target, notes=(*self._target.notes, note))
            return
        slope = (many.prompt_tokens - few.prompt_tokens) / (_MANY_WORDS - _FEW_WORDS)
        around = few.prompt_tokens - slope * _FEW_WORDS
        self._target = replace(self._target, tokens_per_word=slope, tokens_around=around)

    def _refusal(self, status: int, message: str) -> str:
        if status in (401, 403):
            key = "the key was refused" if self._options.api_key else "a key is needed"
            return f"--api-key (or OPENAI_API_KEY): {key}: {self._options.url}: {message} (status {status})"
        return f"{self._options.url} does not answer a first request: {message}"
