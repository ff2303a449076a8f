"""The table of all settings for the documentation: `python -m llmboost.cli.reference > docs/settings.md`."""

from pydantic.fields import FieldInfo

from llmboost.cli.flags import default_of
from llmboost.settings import ApiSettings, CommonSettings, ServeSettings, WorkerSettings, flag, variable

_HEAD = """\
# Settings

Made by `make docs` from `shared/llmboost/settings.py`, where each setting is defined once.

Every setting is a flag and an environment variable; a flag wins over a variable. Flags are written with
dashes or underscores (`--max-num-seqs`, `--max_num_seqs`), with a space or an equals sign before the
value. Switches are `--x` and `--no-x`, their variables `true` and `false`. Settings that take several
values take them separated by commas; their flags may also be repeated. Times are seconds. A value that
can't be parsed or is out of range is refused at start, with its name.

`llmboost serve` takes all of them, `llmboost api` and `llmboost worker` their own and the common ones.
"""

_SECTIONS = (
    ("Common", "Taken by every process.", CommonSettings, ()),
    ("API", "Taken by `serve` and `api`.", ApiSettings, (CommonSettings,)),
    ("Worker", "Taken by `serve` and `worker`.", WorkerSettings, (CommonSettings,)),
    ("Serve", "Taken by `serve` alone.", ServeSettings, (ApiSettings, WorkerSettings)),
)


def reference() -> str:
    """The page, as Markdown."""
    parts = [_HEAD]
    for title, text, settings, without in _SECTIONS:
        inherited = {name for base in without for name in base.model_fields}
        rows = [_row(name, field) for name, field in settings.model_fields.items() if name not in inherited]
        parts.append(
            "\n".join(
                [f"## {title}\n\n{text}\n", "| flag | variable | default | |", "|---|---|---|---|", *rows, ""]
            )
        )
    return "\n".join(parts)


def _row(name: str, field: FieldInfo) -> str:
    spelled = f"`{flag(name)}`"
    if name == "model":
        spelled = "`MODEL`, `--model`, `--model-name`"
    default = f"`{default_of(field)}`" if default_of(field) else ""
    text = (field.description or "").replace("|", "\\|")
    return f"| {spelled} | `{variable(name)}` | {default} | {text} |"


if __name__ == "__main__":
    print(reference(), end="")
