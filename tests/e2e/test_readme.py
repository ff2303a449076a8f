"""What the README says of work that outlives its request, as it stands but for the port."""

import json
import os
import re
import sys
from pathlib import Path

from tests.commands import ROOT
from tests.e2e.system import System
from tests.e2e.test_seed_examples import PORT, run


def block(language: str, words: str) -> str:
    """The one example in the README that has these words in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [each for each in blocks if words in each]
    return str(found)


async def test_a_response_in_the_background(system: System, tmp_path: Path) -> None:
    """It is left at once, and printed from its beginning."""
    script = tmp_path / "background.py"
    script.write_text(block("python", "background=True").replace(PORT, system.url.removeprefix("http://")))
    assert len((await run(sys.executable, str(script))).split()) > 3


async def test_a_batch_from_the_shell(system: System, tmp_path: Path) -> None:
    """Each line of the input is answered in the output; the server is named by a variable."""
    lines = f"cd {tmp_path}\n" + block("bash", "llmboost batch run")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    await run("sh", "-ec", lines, env={"LLMBOOST_URL": system.url, "PATH": path})
    rows = [json.loads(row) for row in (tmp_path / "output.jsonl").read_text().splitlines()]
    assert sorted(row["custom_id"] for row in rows) == ["bird", "cat", "dog"]
    for row in rows:
        assert row["response"]["body"]["choices"][0]["message"]["content"]
