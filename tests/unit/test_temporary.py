"""A temporary folder goes with its process, even if that is killed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llmboost.temporary import TemporaryFolder
from tests.commands import wait_until


def test_it_is_gone_once_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = TemporaryFolder("ours-")
    (folder.path / "file").write_text("x")
    assert list(tmp_path.iterdir()) == [folder.path]
    assert folder.path.stat().st_mode & 0o777 == 0o700
    folder.close()
    assert not list(tmp_path.iterdir())
    folder.close()


def test_closing_it_waits_for_no_other_process(tmp_path: Path) -> None:
    """A fork has all that its parent had open: it may go on while the folder goes."""
    code = (
        "import os, signal\n"
        "from llmboost.temporary import TemporaryFolder\n"
        "folder = TemporaryFolder('ours-')\n"
        "if not (child := os.fork()):\n"
        "    signal.alarm(20)\n"
        "    signal.pause()\n"
        "folder.close()\n"
        "print(os.listdir(os.environ['TMPDIR']), os.waitpid(child, os.WNOHANG))\n"
        "os.kill(child, signal.SIGKILL)\n"
    )
    command, env = [sys.executable, "-c", code], {"TMPDIR": str(tmp_path)}
    assert subprocess.check_output(command, env=env, timeout=60) == b"[] (0, 0)\n"


def test_it_is_gone_once_its_process_is_killed(tmp_path: Path) -> None:
    """Nothing else is."""
    (tmp_path / "ours-not").mkdir()
    code = (
        "import os, signal\n"
        "from llmboost.temporary import TemporaryFolder\n"
        "(TemporaryFolder('ours-').path / 'file').touch()\n"
        "print(os.listdir(os.environ['TMPDIR']))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], env={"TMPDIR": str(tmp_path)}, timeout=60, check=False)
    wait_until(lambda: [path.name for path in tmp_path.iterdir()] == ["ours-not"])
