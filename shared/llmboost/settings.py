"""Every setting, once: its type, default, flag, environment variable and help come from one definition.

A flag `--lease` is the environment variable `LLMBOOST_LEASE` is the field `lease`. Times are seconds.
"""

import base64
import binascii
import json
import os
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

LogLevel = Literal["debug", "info", "warning", "error"]

DEMO_MODEL = "llmboost-demo"
"""The model in the repository; a name like any other, found without a hub."""


def default_files_url() -> str:
    """Where files are kept if nothing else is said: one folder for all pods of a user on a machine."""
    home = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(home, "llmboost", "files")


def _split(value: object) -> object:
    return (
        tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
    )


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""Several values, separated by commas."""


def _origins(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        parts = urlsplit(value)
        whole = parts.scheme and parts.netloc and value == f"{parts.scheme}://{parts.netloc}"
        if value not in ("*", "null") and (not whole or "*" in value or value != value.lower()):
            raise ValueError(
                f"{value!r} must be * or an origin as browsers send it, such as https://chat.example.com "
                "or http://localhost:3000"
            )
    return values


Origins = Annotated[Names, AfterValidator(_origins)]


def _webhook_urls(values: tuple[str, ...]) -> tuple[str, ...]:
    """What is wrong is said without the URL: it may hold a token."""
    for value in values:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must begin with https:// or http:// and a host")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"must hold no user or password ({parts.hostname}): webhooks are signed instead")
        if parts.fragment or not value.isascii() or not value.isprintable() or " " in value:
            raise ValueError(f"must be a URL as it is sent, without blanks and # ({parts.hostname})")
        _ = parts.port  # raises ValueError, in words of its own
    return values


WebhookUrls = Annotated[Names, AfterValidator(_webhook_urls)]

WEBHOOK_SECRET = "whsec_"
"""Before the base64 of a webhook's secret."""
_MIN_SECRET_BYTES = 16


def _webhook_secrets(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        try:
            size = len(base64.b64decode(value.removeprefix(WEBHOOK_SECRET), validate=True))
        except binascii.Error:
            size = 0
        if not value.startswith(WEBHOOK_SECRET) or size < _MIN_SECRET_BYTES:
            raise ValueError(
                f"must be {WEBHOOK_SECRET} and the base64 of {_MIN_SECRET_BYTES} bytes or more; a new one: "
                f"echo {WEBHOOK_SECRET}$(openssl rand -base64 32)"
            )
    return values


WebhookSecrets = Annotated[Names, AfterValidator(_webhook_secrets)]


def _redis_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must begin with redis://, rediss:// or unix://")
    _ = parts.port  # raises ValueError, in words of its own
    return value


RedisUrl = Annotated[str, AfterValidator(_redis_url)]


def _json_object(value: str) -> str:
    if not isinstance(
        json.loads(value), dict
    ):  # what is no JSON at all raises ValueError, in words of its own
        raise ValueError('must be a JSON object, such as {"enforce_eager": true}')
    return value


JsonObject = Annotated[str, AfterValidator(_json_object)]
"""As text, which a variable and a flag can hold."""


class CommonSettings(BaseSettings):
    """Settings that every process takes, from `LLMBOOST_*` variables and flags; flags win.

    Raises:
        pydantic.ValidationError: a value can't be parsed or is out of range; names the field.
    """

    model_config = SettingsConfigDict(
        env_prefix="LLMBOOST_", extra="ignore", frozen=True, allow_inf_nan=False
    )

    redis_url: RedisUrl | None = Field(
        None,
        description="Redis to use, as redis://[:password@]host:port/db. "
        "Without it `serve` starts an embedded server.",
    )
    grace: PositiveFloat = Field(
        5.0, description="Seconds for which a generation goes on after its last reader has left."
    )
    retention: PositiveFloat = Field(600.0, description="Seconds for which a finished stream stays readable.")
    log_level: LogLevel = Field("info", description="What to log, on standard error.")


class ApiSettings(CommonSettings):
    """Settings of an API pod."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8011, description="Port to listen on; 0 takes a free one."
    )
    api_key: Names = Field(
        (), description="Keys that clients must send as `Authorization: Bearer KEY`; none: no check."
    )
    allowed_origins: Origins = Field(
        ("*",),
        description="Web origins whose pages may use the API from a browser, such as "
        "https://chat.example.com; *: any; empty: none but the API's own.",
    )
    request_timeout: PositiveFloat = Field(
        3600.0, description="Seconds after which a request that is not answered ends in an error."
    )
    response_ttl: PositiveFloat = Field(
        30 * 86400.0, description="Seconds for which stored answers and batches are kept after their end."
    )
    max_queued: NonNegativeInt = Field(
        2048, description="Waiting requests per model beyond which new ones get 429; 0: no limit."
    )
    max_request_bytes: PositiveInt = Field(
        8 * 1024 * 1024, description="Largest request body, beyond it 413; and longest line of a batch."
    )
    files_url: str | None = Field(
        None,
        description="Where files are kept: a local folder, or s3://bucket/prefix, for which keys, region and "
        "endpoint are in the usual AWS_* variables. All pods must be given the same. Default: "
        "~/.local/share/llmboost/files; with `serve`, the folder `files` in --data-dir or, if it has an "
        "embedded Redis that keeps nothing, a folder that is removed at the end.",
    )
    max_file_bytes: PositiveInt = Field(
        512 * 1024 * 1024, description="Largest file that may be uploaded; beyond it 413."
    )
    batch_runner: bool = Field(
        True, description="Run batches in this pod. At least one pod must, or they wait for one that does."
    )
    always_include_usage: bool = Field(
        False, description="Send the usage chunk at the end of every stream, asked for or not."
    )
    event_ids: bool = Field(
        True, description="Send an `id:` line with every chunk, from which a stream can be resumed."
    )
    ping_interval: NonNegativeFloat = Field(
        15.0, description="Seconds between keep-alive comments on a stream; 0: none."
    )
    headers_after: NonNegativeFloat = Field(
        3.0,
        description="Seconds in the queue after which a stream's headers go out. "
        "Until then an early failure is a proper HTTP error.",
    )
    receive_timeout: PositiveFloat = Field(
        60.0,
        description="Seconds that a request has to arrive, head and body; beyond them 408, unless its body "
        "comes at 16 KiB a second.",
    )
    send_timeout: PositiveFloat = Field(
        60.0, description="Seconds for which a client may read nothing before its connection is dropped."
    )
    drain_timeout: NonNegativeFloat = Field(
        30.0, description="Seconds that running responses get to finish when the pod is told to go."
    )
    webhook_url: WebhookUrls = Field(
        (),
        description="URLs that are told of the end of background responses and batches; separated by commas.",
    )
    webhook_secret: WebhookSecrets = Field(
        (),
        description="Secret that signs webhooks: `whsec_` and base64. Several, while one replaces another: "
        "each signs.",
    )
    webhook_allow_private: bool = Field(
        False, description="Let webhooks go to private addresses, such as localhost or 10.0.0.1."
    )


class WorkerSettings(CommonSettings):
    """Settings of a worker."""

    model: str = Field(DEMO_MODEL, description="Hub name or local folder of the model.")
    served_model_name: Names = Field(
        (),
        description="Names by which clients ask for the model, instead of its own; separated by commas.",
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What runs the model; vllm must be installed. Workers of both may share a queue.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a model from the hub.")
    trust_remote_code: bool = Field(False, description="Run code that comes with a model from the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of weights and cache; auto: float32 on a CPU, the checkpoint's own on a GPU. "
        "bfloat16 is two to three times as fast on a CPU that multiplies it (AMX, AVX512_BF16), less exact.",
    )
    quantization: Literal["none", "int8"] = Field(
        "none", description="int8: keep weights in 8 bits; what is computed with them stays in --dtype."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    attention_backend: Literal["auto", "flash_attn", "flex", "sdpa"] = Field(
        "auto", description="What attends on a GPU; auto: the quickest that is there and right for the model."
    )
    enable_cuda_graphs: bool = Field(
        True, description="On a GPU, record decoding once per size of the batch, and replay it."
    )
    threads: NonNegativeInt = Field(
        0, description="CPU threads per worker; 0: the available cores, shared among the workers of `serve`."
    )
    tp: PositiveInt = Field(
        1,
        description="GPUs over which one model is split; on a CPU, processes. Each has its own "
        "--kv-cache-memory.",
    )
    pp: PositiveInt = Field(
        1, description="Stages into which a model's layers are split, each on --tp GPUs; with vllm."
    )
    max_model_len: PositiveInt | None = Field(
        None, description="Longest prompt and output together, in tokens; default: the model's own limit."
    )
    kv_cache_memory: PositiveFloat | None = Field(
        None,
        description="GiB for keys and values; default: half of the free memory on a CPU, 0.9 of it on a GPU, "
        "but no more than --max-num-seqs sequences of full length need.",
    )
    max_num_seqs: PositiveInt = Field(256, description="Sequences in one batch.")
    max_num_batched_tokens: PositiveInt = Field(2048, description="Tokens in one step, prefill included.")
    enable_chunked_prefill: bool = Field(
        True, description="Split prompts over several steps, as small as running streams need not to stall."
    )
    enable_prefix_caching: bool = Field(
        True,
        description="Keep what was computed for requests that begin alike, such as the next turn of a "
        "conversation, until its memory is needed.",
    )
    stream_interval: PositiveInt = Field(
        1,
        description="Tokens of a stream that are sent together; 1: each as it comes. The first and the last "
        "never wait. Where the engine needs every core, 2 to 4 leave it more of them.",
    )
    vllm_options: JsonObject = Field(
        "{}",
        description="Further arguments of vLLM's engine, as a JSON object: "
        '{"gpu_memory_utilization": 0.8, "enforce_eager": true}.',
    )
    lease: Annotated[float, Field(ge=0.2)] = Field(
        3.0, description="Seconds after which a dead worker's jobs go to another."
    )
    max_tries: PositiveInt = Field(
        3, description="Workers in a row that a request may take down before it is given up."
    )


class ServeSettings(ApiSettings, WorkerSettings):
    """Settings of `llmboost serve`, which runs everything: all there are."""

    dp: PositiveInt = Field(1, description="Workers to start.")
    data_dir: Path | None = Field(
        None,
        description="Folder in which the embedded Redis keeps its data across restarts; "
        "without it, nothing is kept.",
    )


def to_environment(settings: CommonSettings, takes: type[CommonSettings]) -> dict[str, str]:
    """The environment in which a process that takes `takes` finds the values of `settings`."""
    environment = {}
    for name in takes.model_fields:
        value = getattr(settings, name)
        if isinstance(value, tuple):
            value = ",".join(value)
        # An empty variable is a value too, and not one that a path or a number has: none is left out.
        if value is not None:
            environment[variable(name)] = str(value)
    return environment


def variable(field: str) -> str:
    """The environment variable of a setting."""
    return f"LLMBOOST_{field}".upper()


def flag(field: str) -> str:
    """The command line's flag of a setting."""
    return "--" + field.replace("_", "-")
