"""A model as this machine computes it fastest and rightly."""

import logging

from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers import backends, loader, packing, selftest
from llmboost_worker.engine.transformers.backend import StaticBackend
from llmboost_worker.engine.transformers.cache import KeyValueCache
from llmboost_worker.engine.transformers.config import EngineConfig
from llmboost_worker.engine.transformers.forward import Forward, ModelForward
from llmboost_worker.engine.transformers.graphs import CudaCapture, DecodeGraphs
from llmboost_worker.engine.transformers.loader import LoadedModel

logger = logging.getLogger(__name__)


def load(config: EngineConfig, local_rank: int = 0) -> LoadedModel:
    """
    Raises:
        EngineError: it can't be loaded, or computed rightly.
    """
    loaded = loader.load(config, local_rank)
    expected = selftest.reference(loaded)
    if config.tp == 1 and packing.pack(loaded, config.quantization):
        try:
            _test(config, loaded, expected)
            return loaded
        except Exception as error:  # a model may reach for what has been packed
            if config.quantization != "none":
                raise
            logger.warning("this model is served as transformers has it, unpacked: %s", error)
        del loaded
        loaded = loader.load(config, local_rank)  # packing took the weights
    _test(config, loaded, expected)
    return loaded


def forward(config: EngineConfig, loaded: LoadedModel, cache: KeyValueCache) -> Forward:
    """The loaded model's, over that cache; on a GPU with decoding recorded."""
    if (
        loaded.device.type != "cuda"
        or not config.enable_cuda_graphs
        or config.tp > 1  # the sums between GPUs would be in the graph
        or not isinstance(loaded.forward.backend, StaticBackend)
    ):
        return loaded.forward
    graphs = DecodeGraphs(loaded.forward, cache, CudaCapture(), config.max_num_seqs, loaded.max_model_len)
    graphs.record()
    return graphs


def _test(config: EngineConfig, loaded: LoadedModel, expected: selftest.Reference) -> None:
    """The self-test; on a GPU with the quickest attention that passes it.

    Raises:
        EngineError
    """
    machine = backends.Machine.here(loaded.device)
    names = backends.candidates(config.attention_backend, machine, loaded.dtype, loaded.layers)
    if machine.device == "cpu":
        selftest.run(loaded, expected, config.quantization)
        return
    for name in names:
        try:
            loaded.forward = ModelForward(loaded.model, backends.make(name))
            selftest.run(loaded, expected, config.quantization)
            return
        except (EngineError, ImportError) as error:
            if name == names[-1]:
                raise EngineError(f"with attention by {name}: {error}") from error
            logger.warning("attention by %s isn't to be had: %s", name, error)
