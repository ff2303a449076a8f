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
