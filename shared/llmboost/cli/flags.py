"""Flags made from the settings classes: name, type, default and help come from the one definition."""

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from llmboost.settings import CommonSettings, Names, WorkerSettings, flag, variable

S = TypeVar("S", bound=CommonSettings)

_MODEL_FLAGS = ("--model", "--model-name")
_NO = "--no-"

_ELSEWHERE = {
    "--tensor-parallel-size": "use --tp",
    "--data-parallel-size": "use --dp",
    "--pipeline-parallel-size": "use --pp",
    "--uvicorn-log-level": "use --log-level",
    "--max-queue-size": "use --max-queued",
    "--gpu-memory-utilization": "memory is measured; bound it with --kv-cache-memory, or --vllm-options",
    "--disable-log-requests": "prompts are never logged",
    "--disable-log-stats": "use --log-level",
    "--tokenizer": "the tokenizer is the model's own",
    "--load-format": "weights are read in the format they come in",
    "--swap-space": "nothing is swapped",
    "--enforce-eager": "every model runs eagerly; to vLLM, say it with --vllm-options",
}
"""Flags of other servers, and what to use here."""


SECRETS = ("redis_url", "api_key", "webhook_url", "webhook_secret")
"""Settings whose values stay out of messages: a URL may hold a password, or a token."""


class UsageError(Exception):
    """The command line or the environment is wrong; `str()` names what, the value and what is allowed."""


class Parser(argparse.ArgumentParser):
    """Raises instead of printing the whole usage, in which the one line that matters is lost."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class Flags(Generic[S]):
    """The flags of one command, which fill one settings class."""

    def __init__(self, command: str, settings: type[S], summary: str) -> None:
        self.command = command
        self.settings = settings
        takes_model = issubclass(settings, WorkerSettings)
        self.parser = Parser(
            prog=f"llmboost {command}",
            usage=f"llmboost {command} {'[MODEL] ' if takes_model else ''}[FLAGS]",
            description=summary,
            epilog="Every flag may be set by a variable too: --redis-url is LLMBOOST_REDIS_URL. Flags win. "
            "Underscores are taken for dashes.",
            allow_abbrev=False,
        )
        if takes_model:
            self.parser.add_argument(
                "positional_model",
                nargs="?",
                metavar="MODEL",
                help=describe(settings.model_fields["model"]),
            )
        for name, field in settings.model_fields.items():
            if name == "model":
                self.parser.add_argument(*_MODEL_FLAGS, dest=name, metavar="MODEL", help="The same as MODEL.")
            elif field.annotation is bool:
                self.parser.add_argument(
                    flag(name), dest=name, action=argparse.BooleanOptionalAction, help=describe(field)
                )
            elif is_list(field):
                self.parser.add_argument(
                    flag(name), dest=name, action="append", metavar=metavar(name, field), help=describe(field)
                )
            else:
                self.parser.add_argument(
                    flag(name), dest=name, metavar=metavar(name, field), help=describe(field)
                )

    def parse(self, argv: Sequence[str]) -> S:
        """Settings from these arguments, the environment and the defaults.

        Raises:
            UsageError: an unknown flag, or a value that can't be parsed or is out of range.
        """
        argv = [spelled(argument, self.parser, _ELSEWHERE) for argument in argv]
        given = {
            name: value for name, value in vars(self.parser.parse_args(argv)).items() if value is not None
        }
        positional = given.pop("positional_model", None)
        if positional is not None and given.setdefault("model", positional) != positional:
            raise UsageError(f"two models are given: {positional!r} and --model {given['model']!r}")
        for name, value in given.items():
            if isinstance(value, list):
                given[name] = ",".join(value)
        try:
            return self.settings(**given)
        except ValidationError as error:
            raise UsageError(explain(error, given)) from None


def spelled(argument: str, parser: argparse.ArgumentParser, elsewhere: Mapping[str, str]) -> str:
    """An argument with its flag in the dashed spelling.

    Flags are checked before argparse sees them: it would take the value of an unknown one for a positional
    argument. `elsewhere`: flags of others, and what to use instead.

    Raises:
        UsageError: there is no such flag.
    """
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument.partition("=")
    name = name.replace("_", "-")
    options = parser._option_string_actions
    if name in options:
        return name + equals + value
    bare = "--" + name.removeprefix(_NO) if name.startswith(_NO) else name
    advice = elsewhere.get(bare)
    if advice is None:
        close = difflib.get_close_matches(name, options, 1)
        advice = f"did you mean {close[0]}?" if close else f"see {parser.prog} --help"
    raise UsageError(f"unknown flag {name}: {advice}")


def is_list(field: FieldInfo) -> bool:
    """Whether a setting takes several values."""
    return bool(field.annotation == get_args(Names)[0])


def metavar(name: str, field: FieldInfo) -> str:
    """What stands for the value in help: the choices, or a word for its kind."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if all(isinstance(kind, str) for kind in kinds):
        return "{" + ",".join(map(str, kinds)) + "}"
    plain = (get_args(kinds[0]) or kinds)[0]  # behind an annotation such as `PositiveInt`
    words = {int: "N", float: "SECONDS", Path: "FOLDER"}
    return words.get(plain, name.rpartition("_")[2].upper())


def default_of(field: FieldInfo) -> str:
    """A default as one would type it; empty if there is none."""
    if field.default is None or field.default == ():
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if isinstance(field.default, tuple):
        return ",".join(field.default)
    return f"{field.default:.15g}" if isinstance(field.default, float) else str(field.default)


def describe(field: FieldInfo) -> str:
    """A flag's help."""
    default = default_of(field)
    text = (field.description or "") + (f" [{default}]" if default else "")
    return text.replace("%", "%%")


def explain(error: ValidationError, given: Mapping[str, Any]) -> str:
    """What is wrong, in one line per setting: where it was set, its value, what is allowed."""
    lines = []
    for problem in error.errors():
        name = str(problem["loc"][0])
        where = flag(name) if name in given else variable(name)
        value = given.get(name, os.environ.get(variable(name), problem["input"]))
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").removesuffix(".")
        shown = "" if name in SECRETS else f" {value!r}"
        lines.append(f"{where}{shown}: {message}")
    return "; ".join(lines)
