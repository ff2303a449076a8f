"""The tokens' bytes, on their way into vLLM's processes: grammars are compiled there too."""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

PATH = "LLMBOOST_VLLM_VOCABULARY"
"""The environment variable with the file's name."""


def publish(tokens: Sequence[bytes]) -> Sequence[bytes]:
    """Writes the file; returns its argument."""
    path = Path(os.environ[PATH])
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.msgpack.encode(tokens))
    new.rename(path)
    return tokens


def read() -> Sequence[bytes]:
    """What was published. No sequence with a grammar comes to vLLM before."""
    return msgspec.msgpack.decode(Path(os.environ[PATH]).read_bytes(), type=list[bytes])
