"""`llmboost bench`: what its arguments mean, and in which words they are refused."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llmboost.cli import commands
from llmboost.cli.bench import report
from llmboost.cli.bench.options import DEFAULT_URL, parse
from llmboost.cli.bench.target import Target
from llmboost.cli.bench.values import Load, Span
from llmboost.cli.bench.workload import Question, Workload, read
from llmboost.cli.flags import UsageError


def test_the_defaults_measure_the_server_next_door() -> None:
    options = parse([], {})
    assert options.url == DEFAULT_URL
    assert options.loads == (Load(concurrency=1),)
    assert options.api_key is None


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("http://gateway/team/a/v1", "http://gateway/team/a/v1"),
        ("http://localhost:8000/v1/chat/completions", "http://localhost:8000/v1"),
    ],
)
def test_a_url_is_taken_as_it_is_meant(given: str, url: str) -> None:
    assert parse([given], {}).url == parse(["--base_url", given], {}).url == url


def test_the_key_comes_from_where_users_have_it() -> None:
    assert parse([], {"OPENAI_API_KEY": "a", "LLMBOOST_API_KEY": "b"}).api_key == "a"
    assert parse([], {"LLMBOOST_API_KEY": "b,c"}).api_key == "b"
    assert parse(["--api-key", "d"], {"OPENAI_API_KEY": "a"}).api_key == "d"


def test_lists_and_ranges() -> None:
    options = parse(
        shlex.split("--concurrency 1,4,16 --prompt_tokens 16-256 --output-len 64 --temperature 0,1"), {}
    )
    assert options.loads == (Load(1), Load(4), Load(16))
    assert options.prompt_tokens == Span(16, 256)
    assert options.output_tokens == Span(64, 64)
    assert options.temperatures == (0.0, 1.0)
    assert parse(["--request-rate", "0.5,2"], {}).loads == (Load(rate=0.5), Load(rate=2.0))
    assert parse(["--slo", "ttft:200,itl:50.5"], {}).slo == {"ttft": 200.0, "itl": 50.5}


def test_a_seed_is_another_one_each_time_unless_it_is_given() -> None:
    assert parse(["--seed", "5"], {}).seed == 5
    assert len({parse([], {}).seed for _ in range(5)}) > 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--concurrency 0", "--concurrency '0' must be 1 or more"),
        ("--concurrency 1,,4", "--concurrency '1,,4' must be a value, or several"),
        ("--concurrency 1 --request-rate 2", "give one of them"),
        ("--num-requests 5 --duration 3", "give one of them"),
        ("--request-rate fast", "--request-rate 'fast' must be a number"),
        ("--burstiness 2", "give --request-rate too"),
        ("--num-prefixes 2", "give --shared-prefix-tokens too"),
        ("--prompt-tokens 256-16", "--prompt-tokens '256-16' goes from more to less: 16-256 is meant"),
        ("--output-tokens 0", "--output-tokens '0' must be a number of tokens, or a range"),
        ("--temperature 0,5", "--temperature '0,5' must be from 0 to 2"),
        ("--slo first:200", "--slo 'first:200' must be one of ttft, itl, tpot, e2e"),
        ("--extra-body [1]", "--extra-body '[1]' must be a JSON object"),
        ("--extra-body {", "--extra-body '{' is not JSON"),
        ("--random-input-len 5", "unknown flag --random-input-len: use --prompt-tokens"),
        ("--concurency 5", "unknown flag --concurency: did you mean --concurrency?"),
        ("--plot figure.gif", "--plot 'figure.gif' must end in .png, .svg, .pdf"),
        ("--plot /no/such/folder/figure.png", "the folder '/no/such/folder' does not exist"),
        ("--input /no/such/file", "--input '/no/such/file' does not exist"),
        ("--compare /no/such/file", "--compare '/no/such/file' does not exist"),
        (f"--compare {__file__}", "is not what llmboost bench --json writes"),
        (f"--input {__file__} --prompt-tokens 5", "--prompt-tokens is of prompts that are made up"),
        ("ftp://server", "URL 'ftp://server' must be such as"),
        ("localhost:8000 --base-url localhost:8001", "two URLs are given"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run(["bench", *shlex.split(line)]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert err.startswith("llmboost bench: error: ")
    assert err.count("\n") == 1
    assert not out


def test_nothing_there_is_one_line_that_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["bench", "http://127.0.0.1:9"]) == 1
    out, err = capsys.readouterr()
    assert err == (
        "llmboost bench: error: no server at http://127.0.0.1:9/v1: nothing listens at 127.0.0.1:9 "
        "(start one: llmboost serve, or give its URL)\n"
    )
    assert not out


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "llmboost.cli.bench.plot", raising=False)
    assert commands.run(["bench", "--plot", str(tmp_path / "figure.png")]) == 2
    assert "--plot needs the package 'matplotlib': pip install 'llmboost[bench]'" in capsys.readouterr().err


def test_nothing_heavy_is_imported_without_a_plot() -> None:
    program = (
        "import sys, llmboost.cli.bench.run, llmboost.cli.bench.table, llmboost.cli.bench.command;"
        "sys.exit(', '.join({'matplotlib', 'numpy', 'torch', 'httpx', 'fastapi'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What is asked


def bodies(seed: int, phase: str = "point 0", count: int = 20, target: Target | None = None) -> list[str]:
    options = parse(
        shlex.split(f"--seed {seed} --prompt-tokens 8-12 --output-tokens 2-9 --temperature 0,1"), {}
    )
    workload = Workload(options, target or Target("tiny", "completions", highest_id=1000), None)
    return [json.dumps(workload.body(phase, number)) for number in range(count)]


def test_a_seed_makes_the_same_requests_again_and_no_two_of_them_alike() -> None:
    assert bodies(1) == bodies(1)
    all_of_them = [*bodies(1), *bodies(2), *bodies(1, "point 1"), *bodies(1, "point 0 warmup")]
    assert len({json.dumps(json.loads(body)["prompt"]) for body in all_of_them}) == len(all_of_them)


def test_lengths_and_temperatures_take_all_their_values() -> None:
    found = [json.loads(body) for body in bodies(1, count=300)]
    assert {len(body["prompt"]) for body in found} == set(range(8, 13))
    assert {body["max_tokens"] for body in found} == set(range(2, 10))
    assert {body["temperature"] for body in found} == {0.0, 1.0}
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in found)


def test_fields_that_the_server_refuses_are_left_out() -> None:
    target = Target("tiny", "chat", refused=frozenset({"ignore_eos"}), length_field="max_completion_tokens")
    body = json.loads(bodies(1, target=target)[0])
    assert "ignore_eos" not in body
    assert "max_tokens" not in body
    assert body["max_completion_tokens"] > 1
    assert body["messages"][0]["role"] == "user"


def test_prefixes_are_shared_by_all_and_the_rest_by_none() -> None:
    options = parse(shlex.split("--seed 1 --prompt-tokens 4 --shared-prefix-tokens 32 --num-prefixes 2"), {})
    workload = Workload(options, Target("tiny", "completions", highest_id=1000), None)
    prompts = [workload.body("point 0", number)["prompt"] for number in range(40)]
    prompts += [workload.warmup("point 0", number)["prompt"] for number in range(40)]
    assert {len(prompt) for prompt in prompts} == {36}
    assert len({tuple(prompt[:32]) for prompt in prompts}) == 2
    assert len({tuple(prompt[32:]) for prompt in prompts}) == 80


def test_an_input_is_read_in_every_form(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('"plain"\n\n{"prompt": "p", "output_tokens": 7}\n{"prompt": [1, 2]}\n')
    assert read(source) == [Question("plain"), Question("p", 7), Question([1, 2])]
    messages = [{"role": "user", "content": "hi"}]
    line = {"custom_id": "1", "url": "/v1/chat/completions", "body": {"messages": messages, "max_tokens": 3}}
    source.write_text(json.dumps(line))
    assert read(source) == [Question(messages, 3, is_chat=True)]


def test_the_questions_of_an_input_are_asked_in_turn_and_then_again(tmp_path: Path) -> None:
    options = parse(["--seed", "1", "--output-tokens", "5"], {})
    workload = Workload(options, Target("tiny", "completions"), [Question("a"), Question("b", 9)])
    found = [workload.warmup("point 0", 0), workload.body("point 0", 0), workload.body("point 0", 1)]
    assert [(body["prompt"], body["max_tokens"]) for body in found] == [("a", 5), ("b", 9), ("a", 5)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", ":1: a line needs a prompt, or messages, and not both"),
        ('"a"\nnonsense', ":2: "),
        ("\n\n", "holds no line"),
        ('"a"\n{"messages": []}', "has prompts and messages"),
    ],
)
def test_a_wrong_input_is_refused_with_its_line(text: str, words: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    with pytest.raises(UsageError, match="--input") as raised:
        read(source)
    assert words in str(raised.value)


def test_a_report_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"llmboost_bench": 0}')
    with pytest.raises(UsageError, match="of another version"):
        report.read(tmp_path / "old.json")
