"""An engine on vLLM: its scheduler, kernels, tensor and pipeline parallelism, behind the same interface.

vLLM computes the logits in processes of its own; `drawing` draws from them there as the transformers engine
does, so that a sequence continues on any worker. Follow a request: `engine` (a thread with vLLM's async
engine) -> `params` (ours into vLLM's) -> `drawing` (in vLLM's process) -> `params` (vLLM's into ours).

vLLM is an optional extra: nothing here imports it before an engine starts. And vLLM imports `plugin` in every
process of its own, so this file imports nothing.
"""
