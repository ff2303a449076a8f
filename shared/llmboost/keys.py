"""Every Redis key the project uses, spelled once.

`{...}` is the cluster hash tag: whatever a script touches together lives in one slot.
arq's own keys (`arq:job:<id>`, `arq:retry:<id>`) keep arq's spelling, so its tools can read our jobs.
"""

from arq.constants import job_key_prefix, retry_key_prefix

from llmboost.jobs import JobClass

OPEN = "llmboost:open"
"""Sorted set: id of every stream not yet sealed, by the deadline of its request (ms)."""

AUDIENCE = "llmboost:audience"
"""Sorted set: id of a stream, by the time (ms) until which some reader has said it is there."""

MODELS = "llmboost:models"
"""Sorted set: name of a model, by the time (ms) until which requests for it are accepted."""

WORKERS = "llmboost:workers"
"""Sorted set: id of a worker, by the time (ms) at which its last heartbeat lapses."""

WEBHOOKS = "llmboost:webhooks"
"""Sorted set, arq's: ids of the jobs that announce an end and deliver webhooks, by when they are due (ms)."""


def stream(job_id: str) -> str:
    """The token stream of one request (`llmboost.streams`)."""
    return f"llmboost:stream:{{{job_id}}}"


def once(owner: str, name: str) -> str:
    """String: which request an API key's `Idempotency-Key` stands for (`name` is a digest of it)."""
    return f"llmboost:once:{owner}:{name}"


def stored(completion_id: str) -> str:
    """String (msgpack): what is kept of a stored answer beside its stream."""
    return f"llmboost:stored:{completion_id}"


def stored_by(owner: str) -> str:
    """Sorted set: ids of an API key's stored chat completions, by the time (ms) of their request."""
    return f"llmboost:stored-by:{owner}"


def tailer_wake(tailer: str) -> str:
    """Stream: an entry ends the XREAD in which a tailer waits."""
    return f"llmboost:tailer:{tailer}"


LAST = ":last"
"""Behind the name of a queue: the sorted set of its jobs that have one try left, or none."""


def queue(model: str, job_class: JobClass) -> str:
    """Sorted set: ids of waiting jobs, by enqueue time (ms, with fractions); smaller is nearer the head."""
    return f"llmboost:queue:{model}:{job_class}"


def wake(model: str, job_class: JobClass) -> str:
    """List: one element per enqueued job, popped by workers that wait for one of its class."""
    return f"llmboost:wake:{model}:{job_class}"


def leases(model: str) -> str:
    """Sorted set: ids of claimed jobs, by the time (ms) at which the claim lapses."""
    return f"llmboost:leases:{model}"


def claim(job_id: str) -> str:
    """Hash: who holds the job (`owner`), its `attempt`, where it goes back to, its `deaths` (`leases`)."""
    return f"llmboost:claim:{job_id}"


def probation(worker: str) -> str:
    """String: id of the job of which the worker is thought to have died, should it die now."""
    return f"llmboost:probation:{worker}"


def contact(worker: str) -> str:
    """String: the time (ms) since which the worker's renewals have not been interrupted."""
    return f"llmboost:contact:{worker}"


def model_card(name: str) -> str:
    """String (JSON): what workers say of a model they serve."""
    return f"llmboost:model:{name}"


def worker_card(worker: str) -> str:
    """String (JSON): what a worker says of itself."""
    return f"llmboost:worker:{worker}"


def arq_job(job_id: str) -> str:
    """arq's job definition, msgpack-encoded."""
    return str(job_key_prefix + job_id)


def arq_retry(job_id: str) -> str:
    """arq's count of starts; here, there while an attempt has begun and may yet kill its worker."""
    return str(retry_key_prefix + job_id)


FILES_DUE = "llmboost:files-due"
"""Sorted set: `<owner>:<file id>`, by the time (ms) at which nothing of that file is to be left."""


def file(file_id: str) -> str:
    """String (msgpack): the record of a file; expires with it."""
    return f"llmboost:file:{file_id}"


def files(owner: str) -> str:
    """Sorted set: ids of the files of an API key, by the time (µs) of their making."""
    return f"llmboost:files:{owner}"


BATCHES = "llmboost:batches"
"""Sorted set: id of every batch of which something is left to do, by the time (ms) from which a runner may
take it."""


def batch(batch_id: str) -> str:
    """Hash: the record of a batch, how far it is, and which runner has it."""
    return f"llmboost:batch:{batch_id}"


def batch_lines(batch_id: str) -> str:
    """Bitmap: the lines of a batch whose result is in one of its parts (line 1 is bit 0)."""
    return f"llmboost:batch-lines:{batch_id}"


def batch_parts(batch_id: str) -> str:
    """Sorted set: the objects that hold results of a batch, in the order in which they were committed."""
    return f"llmboost:batch-parts:{batch_id}"


def batch_sealed(batch_id: str) -> str:
    """List: ids of streams of a batch that have been sealed; a hint, for it may be lost with its reader."""
    return f"llmboost:batch-sealed:{batch_id}"


def batches(owner: str) -> str:
    """Sorted set: ids of the batches of an API key, by the time (µs) of their making."""
    return f"llmboost:batches:{owner}"
