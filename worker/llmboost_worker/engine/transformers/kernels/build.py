"""Compiles the kernels for this machine's processor, once: the result is kept in the user's cache."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))

COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order, after what the variable CXX names."""

FLAGS = (
    "-std=c++17",
    "-O3",
    # For this processor alone: the file's name in the cache says for which.
    "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
)

TIMEOUT_S = 120


class BuildError(Exception):
    """There is no compiler, or it fails; the message says which."""


@cache
def loaded() -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    """The kernels' functions: such as let go of the interpreter's lock, and such as keep it. Letting go costs
    more than the short ones take, and getting it back may take as long as the event loop likes.

    Raises:
        BuildError
    """
    path = str(library())
    try:
        return ctypes.CDLL(path), ctypes.PyDLL(path)
    except OSError as error:
        raise BuildError(f"can't load {path}: {error}") from error


def library() -> Path:
    """The compiled kernels, a shared library to be loaded after torch: they run on its OpenMP threads, whose
    library has the same name as the one that the compiler links, so that the loader takes no second one.

    Raises:
        BuildError
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmboost"
    path = folder / f"kernels-{_fingerprint()}.so"
    if not path.exists():
        _compile(path)
    return path


def _compile(path: Path) -> None:
    compiler = _compiler()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several workers may start at once: each compiles beside the path, the last to rename wins.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            done = subprocess.run(
                [compiler, *FLAGS, *map(str, SOURCES), "-o", str(made)],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                raise BuildError(f"{compiler} fails: {done.stderr.strip() or done.returncode}")
            made.replace(path)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"can't compile: {error}") from error
    logger.info("compiled the CPU kernels into %s", path)


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), *COMPILERS)):
        if found := shutil.which(name):
            return found
    raise BuildError(f"there is no C++ compiler (looked for {', '.join(COMPILERS)}, and for CXX)")


def _fingerprint() -> str:
    """Of everything that the compiled file depends on."""
    digest = hashlib.blake2b(digest_size=8)
    sources = [source.read_bytes() for source in (*SOURCES, *HEADERS)]
    for part in (*sources, " ".join(FLAGS).encode(), _compiler_name(), _processor()):
        digest.update(part + b"\0")
    return digest.hexdigest()


def _compiler_name() -> bytes:
    return (os.environ.get("CXX") or "").encode()


def _processor() -> bytes:
    """What tells processors apart that understand different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode()
