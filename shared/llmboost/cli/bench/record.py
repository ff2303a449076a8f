"""What happened to one request."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """Times are those of `time.perf_counter()`, in seconds."""

    sent: float = 0.0
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """When text was read from the network."""
    chunks: list[int] = field(default_factory=list)
    """How many chunks with text came with each arrival."""
    prompt_tokens: int = 0
    """0: the server does not say."""
    cached_tokens: int = 0
    counted_tokens: int | None = None
    """Of the answer, as the server counts them. None: it does not."""
    status: int = 0
    """Of HTTP; 0: there was no answer."""
    error: str | None = None
    """What went wrong, in a word or two: the same for all of its kind."""
    message: str = ""
    """More of it."""

    @property
    def output_tokens(self) -> int:
        """By the server's count: a chunk may hold several, or wait until characters are whole."""
        return sum(self.chunks) if self.counted_tokens is None else self.counted_tokens

    @property
    def ttft(self) -> float | None:
        """Time to first token; None if there was no text."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def e2e(self) -> float:
        """End to end: from sending to the end of the answer."""
        return self.ended - self.sent

    @property
    def gaps(self) -> list[float]:
        """From one arrival of text to the next."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None if there are no two."""
        tokens = self.output_tokens - 1
        if tokens < 1 or not self.arrivals:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / tokens
