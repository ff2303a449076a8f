"""The command line: what it accepts, what it refuses, and in which words."""

import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmboost.cli import commands, serve
from llmboost.settings import ServeSettings, WorkerSettings, variable
from tests.commands import ROOT

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServeSettings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    """Settings with which `serve` would have run."""
    calls: list[ServeSettings] = []

    def record(settings: ServeSettings) -> int:
        calls.append(settings)
        return 0

    monkeypatch.setattr(serve, "serve", record)
    return calls


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    "line",
    [
        "serve meta-llama/Llama-3.1-8B-Instruct --port 0",
        "serve --model_name meta-llama/Llama-3.1-8B-Instruct --port=0",
        "serve --port 0 --model meta-llama/Llama-3.1-8B-Instruct --max_num_seqs 8 --enable_chunked_prefill",
    ],
)
def test_the_commands_of_the_documentation(line: str, served: list[ServeSettings]) -> None:
    assert commands.run(shlex.split(line)) == 0
    assert served[0].model == "meta-llama/Llama-3.1-8B-Instruct"


def test_a_folder_is_taken_as_it_is(
    served: list[ServeSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, taken in [
        (str(tmp_path / "model"), str(tmp_path / "model")),
        ("./model", "./model"),
        ("~/model", str(tmp_path / "model")),
    ]:
        assert commands.run(["serve", given, "--port", "0"]) == 0
        assert served.pop().model == taken


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("serv", "unknown command 'serv': did you mean serve?"),
        ("serve ./no/such/model --port 0", "model './no/such/model' does not exist"),
        ("serve ~/no/such/model --port 0", "model '~/no/such/model' does not exist"),
        (f"serve {__file__} --port 0", "is not a folder"),
        ("serve --redis-url redis://localhost --data-dir d", "--data-dir is the embedded Redis's"),
        ("serve --port 99999", "--port '99999'"),
        ("serve --host no.such.host.invalid", "--host 'no.such.host.invalid'"),
        ("api", "--redis-url (or LLMBOOST_REDIS_URL) is needed"),
        (
            "api --redis-url redis://localhost --webhook-url https://hooks.example",
            "--webhook-secret (or LLMBOOST_WEBHOOK_SECRET) is needed with --webhook-url",
        ),
        (
            f"serve --port 0 --webhook-url http://127.1/token --webhook-secret {SECRET}",
            "--webhook-url names 127.1, a private address; if webhooks are to go there, "
            "give --webhook-allow-private",
        ),
        ("worker", "--redis-url (or LLMBOOST_REDIS_URL) is needed"),
        ("worker /no/such/model --redis-url redis://localhost", "does not exist"),
        ("worker --port 1 --redis-url redis://localhost", "unknown flag --port"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run(line.split()) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize("command", ["serve", "api --redis-url redis://localhost"])
def test_a_busy_port_is_said_before_anything_is_started(
    command: str, busy_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run([*command.split(), "--port", str(busy_port)]) == 2
    assert f"port {busy_port} on 127.0.0.1 is in use" in capsys.readouterr().err


def test_a_misspelt_variable_is_pointed_out(
    served: list[ServeSettings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMBOOST_MAX_NUM_SEQ", "8")
    assert commands.run(["serve", "--port", "0"]) == 0
    monkeypatch.setenv("LLMBOOST_URL", "http://localhost:8011/v1")
    assert commands.run(["serve", "--port", "0"]) == 0
    (line, again) = capsys.readouterr().err.splitlines()
    assert line == again
    assert line.endswith("LLMBOOST_MAX_NUM_SEQ is no setting; did you mean LLMBOOST_MAX_NUM_SEQS?")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["--help"]) == 0
    assert "llmboost serve [MODEL]" in capsys.readouterr().out
    assert commands.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("llmboost ")
    with pytest.raises(SystemExit) as end:
        commands.run(["serve", "--help"])
    assert end.value.code == 0
    assert "LLMBOOST_REDIS_URL" in capsys.readouterr().out


def test_the_command_line_starts_without_heavy_imports() -> None:
    """Neither side is loaded until its command runs."""
    code = (
        "import sys\n"
        "from llmboost.cli import commands\n"
        "assert commands.run(['--help']) == 0\n"
        "assert commands.run(['worker']) == 2\n"
        "assert commands.run(['batch']) == 2\n"
        "assert commands.run(['batch', 'run', '/no/such/file']) == 2\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'arq', 'httpx', 'rich', 'openai'}\n"
        "heavy |= {'llmboost_api', 'llmboost_worker'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_both_names_of_the_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"llmboost": "llmboost.cli:main", "lbh": "llmboost.cli:main"}


def test_python_m_llmboost() -> None:
    end = subprocess.run(
        [sys.executable, "-m", "llmboost", "serve", "--port", "x"], capture_output=True, text=True, timeout=60
    )
    assert end.returncode == 2
    assert end.stderr.startswith("llmboost serve: error: --port 'x'")


def test_the_line_to_paste_survives_the_shell() -> None:
    """Quotes in a model's name, IPv6, and a key that must not be printed."""
    settings = ServeSettings(model="it's", api_key=("secret",))
    text = serve.banner(settings, "http://[::1]:8011", "it's")
    words = shlex.split(text.strip().splitlines()[-1])
    assert words[:3] == ["curl", "-N", "http://[::1]:8011/v1/chat/completions"]
    assert '"model": "it\'s"' in words[-1]
    assert "secret" not in text
    assert "Authorization: Bearer $LLMBOOST_API_KEY" in words


def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(commands, "import_module", missing)
    assert commands.run(["worker", "--redis-url", "redis://localhost"]) == 2
    assert "pip install 'llmboost[worker]'" in capsys.readouterr().err


def test_settings_given_to_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """`llmboost worker MODEL` hands its settings over, and its exit code back."""
    seen: list[WorkerSettings] = []

    class Side:
        @staticmethod
        def run(settings: WorkerSettings) -> int:
            seen.append(settings)
            return 78

    monkeypatch.setattr(commands, "import_module", lambda module: Side)
    assert commands.run(["worker", "some/model", "--redis-url", "redis://localhost"]) == 78
    assert seen[0].model == "some/model"
