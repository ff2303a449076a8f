"""Server-sent events of a completion, counted as cheaply as they come."""

import msgspec

_DONE = b"[DONE]"


class _Text(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Text | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """A server's own count of tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None

    @property
    def cached_tokens(self) -> int:
        """Of the prompt's, those that the server had computed before."""
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class _Chunk(msgspec.Struct):
    """What is read of a chunk; msgspec passes over the rest without making objects of it."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


class Events:
    """The events of one response, fed with its bytes as they are cut by the network."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.error: str | None = None
        """In whose words the server, or the parsing of what it sent, failed."""
        self.is_complete = False
        """`[DONE]` has come, or a reason to finish: not every server says `[DONE]`."""
        self._rest = b""

    def feed(self, data: bytes) -> int:
        """Takes bytes; returns how many chunks with text they brought to an end."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        return sum(self._take(line) for line in lines if line.startswith(b"data:"))

    def finish(self) -> int:
        """Takes a last line that no line break has ended."""
        rest, self._rest = self._rest, b""
        return self._take(rest) if rest.startswith(b"data:") else 0

    def _take(self, line: bytes) -> bool:
        payload = line[5:].strip()
        if payload == _DONE:
            self.is_complete = True
            return False
        try:
            chunk = _decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.error = self.error or f"a chunk that is not OpenAI's: {error}: {shown(payload)}"
            return False
        if chunk.error and chunk.error != b"null":
            self.error = message_in(payload)
        if chunk.usage is not None:
            self.usage = chunk.usage
        has_text = False
        for choice in chunk.choices:
            delta = choice.delta
            if choice.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning)):
                has_text = True
            if choice.finish_reason is not None:
                self.is_complete = True
        return has_text


def message_in(body: bytes) -> str:
    """What an error's body says, whoever's form it has."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return shown(body)
    for name in ("error", "message", "detail"):
        while isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) else shown(body)


def shown(body: bytes) -> str:
    """The beginning of it, on one line."""
    text = " ".join(body[:400].decode(errors="replace").split())
    return text[:200] + ("…" if len(text) > 200 else "")


_decode = msgspec.json.Decoder(_Chunk).decode
