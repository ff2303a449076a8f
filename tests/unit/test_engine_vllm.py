"""What of the vLLM engine can be tested where vLLM isn't installed."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.vllm import environment, plugin
from llmboost_worker.engine.vllm.complaints import EVERYONE, Inbox, Outbox
from llmboost_worker.engine.vllm.config import VllmConfig
from llmboost_worker.engine.vllm.engine import VllmEngine
from llmboost_worker.engine.vllm.folder import SOCKETS, EngineFolder


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("VLLM_", "OMP_", "LLMBOOST_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_the_settings_reach_vllm_by_its_own_names() -> None:
    config = VllmConfig(
        "some/model",
        revision="main",
        max_model_len=4096,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        kv_cache_memory=1.5,
        quantization="int8",
        tensor_parallel=4,
        pipeline_parallel=2,
        options={"gpu_memory_utilization": 0.8, "max_num_seqs": 9},
    )
    expected = {
        "model": "some/model",
        "revision": "main",
        "max_model_len": 4096,
        "max_num_seqs": 9,  # options win
        "max_num_batched_tokens": 512,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 3 << 29,
        "quantization": "int8_per_channel_weight_only",
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 2,
        "gpu_memory_utilization": 0.8,
    }
    assert expected.items() <= config.arguments().items()


@pytest.mark.parametrize(
    ("threads", "processes", "cores", "expected"),
    [
        (None, 1, 4, ("nobind", 4)),
        (2, 1, 4, ("nobind", 2)),
        (None, 2, 4, ("0,2|4,6", 0)),
        (None, 2, 3, ("nobind", 1)),  # a quota of the container's
        (4, 2, 4, ("nobind", 2)),
        (None, 5, 4, ("nobind", 1)),
    ],
)
def test_threads_of_several_processes_are_bound_where_the_machine_is_ours(
    monkeypatch: pytest.MonkeyPatch,
    threads: int | None,
    processes: int,
    cores: int,
    expected: tuple[str, int],
) -> None:
    """One for each core: its second thread stays free."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(environment, "available_cores", lambda: cores)
    monkeypatch.setattr(environment, "_siblings", lambda cpu: f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}")
    assert environment.threads_of(threads, processes) == expected


def test_what_the_user_has_set_for_vllm_stays() -> None:
    os.environ["VLLM_NO_USAGE_STATS"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "3"
    environment.prepare("info", is_eager=False)
    assert environment.prepare_cpu(threads=1, processes=1)
    assert os.environ["VLLM_NO_USAGE_STATS"] == "0"
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "3"
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_complaints_arrive_for_those_that_are_expected(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    outbox = Outbox()
    inbox.expect("a")
    outbox.send("a", "too hot", True)
    outbox.send("b", "too cold")
    complaint = inbox.complaint("a")
    assert complaint is not None
    assert (complaint.reason, complaint.is_refused) == ("too hot", True)
    inbox.forget("a")
    inbox.expect("b")
    assert inbox.complaint("a") is inbox.complaint("b") is inbox.trouble is None
    outbox.send(EVERYONE, "first")
    outbox.send(EVERYONE, "second")
    inbox.close()
    assert inbox.trouble == "first"
    outbox.send("a", "nobody listens any more")


def test_vllms_sockets_are_in_the_engines_folder_and_go_with_it() -> None:
    """The next engine in this process has a folder of its own."""
    for _ in range(2):
        folder = EngineFolder()
        assert os.environ[SOCKETS] == str(folder.path)
        folder.close()
        assert SOCKETS not in os.environ
    os.environ[SOCKETS] = tempfile.gettempdir()
    EngineFolder().close()
    assert os.environ[SOCKETS] == tempfile.gettempdir()


def test_the_plugin_does_nothing_where_vllm_is_used_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_end_with", pytest.fail)
    plugin.register()
    os.environ[environment.OWNER] = str(os.getpid())
    plugin.register()


def test_without_vllm_the_engine_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    engine = VllmEngine(VllmConfig("some/model"))
    with pytest.raises(EngineError, match=r"pip install 'llmboost\[vllm\]'"):
        engine.start(lambda step: None, lambda error: None)
    engine.close()
