"""What the vLLM engine makes of vLLM."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmboost_worker.engine.interface import EngineError, SequenceOutput, StepOutput
from llmboost_worker.engine.vllm.config import VllmConfig
from llmboost_worker.engine.vllm.engine import VllmEngine
from tests.unit.engine_kinds import CONFIG, OPTIONS, driving_kind, driving_vllm
from tests.unit.engine_models import COMMON, Driver, prompt, request, save_model

LONG = {"max_tokens": 400, "ignore_eos": True}


def outputs(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[SequenceOutput]:
    """All that the engine gives from now on."""
    seen: list[SequenceOutput] = []
    take = driver._on_step

    def on_step(step: StepOutput) -> None:
        seen.extend(step)
        take(step)

    monkeypatch.setattr(driver.engine, "_on_step", on_step)
    return seen


def vllm_processes() -> list[psutil.Process]:
    """Living children of this process that vLLM has named."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "VLLM::" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def files_in(folder: Path) -> set[str]:
    """Without the cache of compiled kernels, which is for the next engine too."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")}


def test_a_prefix_that_was_computed_before_is_found(
    vllm_driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as whole blocks go, and no more than the prompt: what an earlier attempt emitted is output."""
    seen = outputs(vllm_driver, monkeypatch)
    shared = prompt(300, seed=77)
    vllm_driver.run_one(request("first", shared, max_tokens=4, ignore_eos=True))
    vllm_driver.run_one(request("second", shared, max_tokens=4, ignore_eos=True))
    half, rest = shared[:100], shared[100:]
    vllm_driver.run_one(request("resumed", half, rest, max_tokens=204, ignore_eos=True))
    cached: dict[str, list[int]] = {}
    for output in seen:
        cached.setdefault(output.id, []).append(output.cached_tokens)
    assert {id: counts[0] for id, counts in cached.items()} == {"first": 0, "second": 256, "resumed": 100}
    assert not any(count for counts in cached.values() for count in counts[1:])
    assert {id: len(vllm_driver.tokens(id)) for id in cached} == dict.fromkeys(cached, 4)


@pytest.mark.parametrize("output_ids", [[], [5, 6]], ids=["fresh", "resumed"])
def test_logprobs_of_the_prompt(
    vllm_driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output_ids: list[int]
) -> None:
    """With the first output: none for the first token, then the model's, and nothing of what is output."""
    seen = outputs(vllm_driver, monkeypatch)
    ids = prompt(40)
    vllm_driver.run_one(request("asked", ids, output_ids, prompt_logprobs=3, max_tokens=5, ignore_eos=True))
    assert all(output.prompt_logprobs is None for output in seen[1:])
    reported = seen[0].prompt_logprobs
    assert reported is not None
    assert reported[0] is None
    model = AutoModelForCausalLM.from_pretrained(save_model(CONFIG, tmp_path), dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    assert len(reported) == len(ids)
    for token, each, row in zip(ids[1:], reported[1:], expected, strict=True):
        assert each is not None
        assert each.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [id for id, _ in each.top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize("options", [{"prompt_ids": []}, {"prompt_ids": [5], "prompt_logprobs": 21}], ids=str)
def test_what_is_the_requests_fault_is_said_to_be(
    vllm_driver: Driver, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Found by us, and by vLLM."""
    seen = outputs(vllm_driver, monkeypatch)
    vllm_driver.run_one(request("refused", **options))
    assert [(output.finish_reason, output.is_refused) for output in seen] == [("error", True)]


def test_closing_in_the_middle_of_work_leaves_no_process_and_no_file(
    tmp_path: Path, temporary_files: Path
) -> None:
    others, other_files = vllm_processes(), files_in(temporary_files)
    with driving_kind("vllm", tmp_path) as driver:
        driver.engine.add([request("long", prompt(20), **LONG)])
        driver.wait(lambda: driver.tokens("long"))
        assert len(vllm_processes()) == len(others) + 1
        driver.engine.close()
        driver.engine.close()
        assert vllm_processes() == others
        assert files_in(temporary_files) == other_files
        assert driver.engine.stats().running == 0
        with pytest.raises(EngineError, match="closed"):
            driver.engine.add([request("late", prompt(20))])
    assert not driver.failures
    assert not driver.finished("long")


@pytest.mark.parametrize(
    ("processes", "name", "busy"),
    [(1, "VLLM::EngineCore", False), (1, "VLLM::EngineCore", True), (2, "VLLM::Worker_TP1", True)],
)
def test_when_a_process_of_vllm_dies_the_engine_says_so_once(
    tmp_path: Path, processes: int, name: str, busy: bool
) -> None:
    """And no sequence is told that it has failed: another worker continues it."""
    others = vllm_processes()
    folder = save_model(CONFIG, tmp_path)
    with driving_vllm(folder, tensor_parallel=processes, **OPTIONS) as driver:
        if busy:
            driver.engine.add([request(f"{i}", prompt(20), **LONG) for i in range(3)])
            driver.wait(lambda: all(driver.tokens(f"{i}") for i in range(3)))
        (victim,) = [each for each in vllm_processes() if each not in others and name in each.cmdline()[0]]
        victim.kill()
        driver.wait(lambda: driver.failures)
        with pytest.raises(EngineError, match="vLLM has ended"):
            driver.engine.add([request("late", prompt(20))])
    assert len(driver.failures) == 1
    assert not any(sequence.finish_reason for sequence in driver.sequences.values())
    assert vllm_processes() == others


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"head_dim": 16}, {}, "head_dim=16"),
        ({}, {"device": "cuda"}, "built for cpu"),
        ({}, {"max_model_len": 100_000}, "max_model_len"),
        ({}, {"options": {"nonsense": 1}}, "'nonsense' is no argument"),
        ({}, {"options": {"logits_processors": []}}, "'logits_processors' is not for you"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_at_start_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    """The first of them is found by no check of vLLM's: it would load, and end at the first request."""
    others = vllm_processes()
    folder = save_model(type(CONFIG)(**{**COMMON, "head_dim": 32, **changes}), tmp_path)
    eager = {"enforce_eager": True}
    engine = VllmEngine(VllmConfig(str(folder), kv_cache_memory=0.1, **{"options": eager, **options}))
    with pytest.raises(EngineError, match=reason):
        engine.start(lambda step: None, lambda error: None)
    engine.close()
    assert vllm_processes() == others
