"""Flags, environment and documentation come from one definition of each setting."""

from pathlib import Path
from typing import Any, get_args

import pytest

from llmboost.cli.flags import Flags, UsageError, is_list, metavar
from llmboost.cli.reference import reference
from llmboost.settings import (
    ApiSettings,
    CommonSettings,
    ServeSettings,
    WorkerSettings,
    flag,
    to_environment,
    variable,
)

ROOT = Path(__file__).parents[2]
OLD_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NEW_SECRET = "whsec_RdvaYFYUXuIFuEbvZHwMfYFhUf7aMYjYcmM24+Aj40c="
CLASSES = (ApiSettings, WorkerSettings, ServeSettings)
FIELDS = [(settings, name) for settings in CLASSES for name in settings.model_fields]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServeSettings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


def parse(settings: type[CommonSettings], *argv: str) -> Any:
    return Flags("serve", settings, "").parse(argv)


def sample(settings: type[CommonSettings], name: str) -> tuple[str, Any]:
    """A value other than the default, as text and as the setting holds it."""
    field = settings.model_fields[name]
    if field.annotation is bool:
        return str(not field.default).lower(), not field.default
    if name == "allowed_origins":
        return "https://one.example,http://two:3000", ("https://one.example", "http://two:3000")
    if name == "webhook_url":
        return "https://one.example/a,http://two:3000", ("https://one.example/a", "http://two:3000")
    if name == "webhook_secret":
        return f"{OLD_SECRET},{NEW_SECRET}", (OLD_SECRET, NEW_SECRET)
    if is_list(field):
        return "one,two", ("one", "two")
    if name == "vllm_options":
        return '{"enforce_eager": true}', '{"enforce_eager": true}'
    if name == "redis_url":
        return "redis://:secret@example.org:6380/2", "redis://:secret@example.org:6380/2"
    kind = metavar(name, field)
    if kind.startswith("{"):
        last = kind.strip("{}").split(",")[-1]
        return last, last
    return {
        "N": ("7", 7),
        "SECONDS": ("7.5", 7.5),
        "FOLDER": ("/some/folder", Path("/some/folder")),
    }.get(kind, ("something", "something"))


@pytest.mark.parametrize(("settings", "name"), FIELDS)
def test_every_setting_is_a_flag_and_a_variable(
    settings: type[CommonSettings], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, value = sample(settings, name)
    dashes = flag(name)
    if settings.model_fields[name].annotation is bool:
        spellings = [[dashes if value else dashes.replace("--", "--no-", 1)]]
    else:
        spellings = [[dashes, text], [f"{dashes}={text}"]]
    spellings += [[argv[0].replace("-", "_").replace("__", "--", 1), *argv[1:]] for argv in spellings]
    for argv in spellings:
        assert getattr(parse(settings, *argv), name) == value, argv
    monkeypatch.setenv(variable(name), text)
    assert getattr(parse(settings), name) == value


@pytest.mark.parametrize(("settings", "name"), FIELDS)
def test_every_setting_reaches_a_child_process(
    settings: type[CommonSettings], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(**{name: sample(settings, name)[1]})
    for key, text in to_environment(given, settings).items():
        monkeypatch.setenv(key, text)
    assert settings() == given


@pytest.mark.parametrize(("settings", "name"), FIELDS)
def test_every_setting_says_what_it_is(settings: type[CommonSettings], name: str) -> None:
    assert (settings.model_fields[name].description or "").strip().endswith((".", ":"))


def test_a_flag_wins_over_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBOOST_PORT", "1")
    assert parse(ApiSettings, "--port", "2").port == 2


def test_a_list_is_repeated_or_comma_separated() -> None:
    names = ("a", "b", "c")
    assert (
        parse(WorkerSettings, "--served-model-name", "a,b", "--served_model_name=c").served_model_name
        == names
    )


def test_the_model_is_positional_or_a_flag() -> None:
    assert parse(ServeSettings, "some/model").model == "some/model"
    for spelling in ("--model", "--model_name", "--model-name"):
        assert parse(ServeSettings, spelling, "some/model").model == "some/model"
    assert parse(ServeSettings).model == "llmboost-demo"
    with pytest.raises(UsageError, match="two models"):
        parse(ServeSettings, "one", "--model", "other")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--port", "99999"], ["--port", "'99999'", "65535"]),
        (["--port=many"], ["--port", "'many'", "integer"]),
        (["--grace", "-1"], ["--grace", "'-1'", "greater than 0"]),
        (["--grace", "inf"], ["--grace", "'inf'", "finite"]),
        (["--lease", "0.1"], ["--lease", "'0.1'", "0.2"]),
        (["--dtype", "int3"], ["--dtype", "'int3'", "'bfloat16'"]),
        (["--max_num_seqs", "0"], ["--max-num-seqs", "'0'", "greater than 0"]),
        (["--vllm-options", "[1]"], ["--vllm-options", "'[1]'", "a JSON object"]),
        (["--vllm-options", "{x"], ["--vllm-options", "'{x'", "double quotes"]),
        (["--max-num-seq", "4"], ["--max-num-seq", "--max-num-seqs?"]),
        (["--no-event-id"], ["--no-event-id", "--no-event-ids?"]),
        (["--tensor-parallel-size", "2"], ["--tensor-parallel-size", "--tp"]),
        (["--no-load-format"], ["--no-load-format", "the format they come in"]),
        (["--allowed-origins", "*,a.example"], ["--allowed-origins", "'a.example'", "https://"]),
        (["--allowed-origins", "https://a.example/"], ["'https://a.example/'"]),
        (["--allowed-origins", "https://*.example"], ["'https://*.example'"]),
        (["--port"], ["--port", "expected one argument"]),
        (["one", "two"], ["two"]),
    ],
)
def test_a_wrong_flag_is_refused_by_name(argv: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        parse(ServeSettings, *argv)
    for word in words:
        assert word in str(error.value)


def test_a_wrong_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBOOST_MAX_TRIES", "few")
    with pytest.raises(UsageError, match="LLMBOOST_MAX_TRIES 'few'"):
        parse(WorkerSettings)


def test_two_wrong_values_are_both_named() -> None:
    with pytest.raises(UsageError, match=r"--port .*; .*--dp|--dp .*; .*--port"):
        parse(ServeSettings, "--port=x", "--dp=0")


def test_a_password_stays_out_of_the_message() -> None:
    with pytest.raises(UsageError, match="--redis-url: must begin with redis://") as error:
        parse(ServeSettings, "--redis-url", "http://:hunter2@host")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--webhook-url=ftp://hunter2.example", "--webhook-url: must begin with https://"),
        ("--webhook-url=https://user:hunter2@host", "--webhook-url: must hold no user or password"),
        ("--webhook-url=https://host/hunter2#x", "--webhook-url: must be a URL as it is sent"),
        ("--webhook-url=https://host:hunter2", "--webhook-url: "),
        ("--webhook-secret=hunter2", "--webhook-secret: must be whsec_ and the base64 of 16 bytes"),
        ("--webhook-secret=whsec_hunter2=", "--webhook-secret: must be whsec_"),
        (f"--webhook-secret={NEW_SECRET},whsec_aHVudGVyMg==", "--webhook-secret: must be whsec_"),
    ],
)
def test_a_wrong_webhook_is_refused_without_its_secrets(argv: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(ServeSettings, argv)
    assert str(error.value).startswith(words)
    assert "hunter2" not in str(error.value) or argv.startswith("--webhook-url=https://host:")
    assert "aHVudGVyMg" not in str(error.value)


def test_choices_are_shown_in_help() -> None:
    help_text = Flags("worker", WorkerSettings, "").parser.format_help()
    for choice in get_args(WorkerSettings.model_fields["dtype"].annotation):
        assert choice in help_text


def test_the_documented_table_is_up_to_date() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == reference(), "run `make docs`"
