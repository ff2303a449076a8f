"""`llmboost bench` on the demo model, as a user runs it."""

import json
import shlex
from pathlib import Path

from tests.commands import llmboost
from tests.e2e.system import System


def test_a_sweep_over_the_demo_model(system: System, tmp_path: Path) -> None:
    """Every request is answered in full, with prompts of the length that was asked for, at both endpoints."""
    for endpoint, prompts in (("completions", 24), ("chat", None)):
        place = tmp_path / f"{endpoint}.json"
        flags = "--concurrency 1,8 --num-requests 8 --prompt-tokens 24 --output-tokens 12"
        arguments = [system.url, *shlex.split(flags), "--endpoint", endpoint, "--json", str(place)]
        with llmboost("bench", *arguments) as command:
            assert command.wait() == 0, command.log
        report = json.loads(place.read_text())
        assert report["model"] == system.http().get("/v1/models").json()["data"][0]["id"]
        for point, concurrency in zip(report["points"], (1, 8), strict=True):
            assert point["concurrency"] == concurrency
            assert point["requests"] == {"ok": 8, "failed": 0}
            assert point["output_tokens"] == 8 * 12
            assert point["counted_by"] == "usage"
            assert point["ttft_ms"]["p50"] < point["e2e_ms"]["p50"]
            if prompts is not None:
                assert point["mean_prompt_tokens"] == prompts
        assert any("first token" in line for line in command.out), command.log
