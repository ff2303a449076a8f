"""An engine on torch and transformers: any causal language model that transformers has, on a CPU or a GPU.

Follow a step: `engine` (the thread) -> `core` (schedule, run, postprocess) -> `scheduler` -> `runner` (one
forward) -> attention over the blocks of `cache` -> sampling.
"""

from llmboost_worker.engine.transformers.config import EngineConfig
from llmboost_worker.engine.transformers.engine import TransformersEngine

__all__ = ["EngineConfig", "TransformersEngine"]
