"""Files that are there whole or not at all."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, cast

from llmboost.cli.batch.options import STANDARD


@contextmanager
def written(place: str) -> Iterator[BinaryIO]:
    """A file to write, which takes its place at the end of the block; after an error nothing is changed."""
    if place == STANDARD:
        with tempfile.TemporaryFile() as copy:
            yield cast(BinaryIO, copy)
            copy.seek(0)
            shutil.copyfileobj(copy, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        return
    folder, name = os.path.split(place)
    part = os.path.join(folder, f".{name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, place)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(part)
        raise
