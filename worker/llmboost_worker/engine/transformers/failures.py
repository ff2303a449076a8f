"""What an exception in a step means: for the device, for the sequences, and for whoever reads of it."""

import torch

CUDA_OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation: of CUDA's own errors the one after which the device goes on."""

SHOWN = 200
"""Characters of an exception's message that a client reads."""


class RankLost(RuntimeError):
    """One of the processes over which the model is split doesn't compute any more."""


def is_device_lost(error: BaseException) -> bool:
    """Nothing can be computed any more, so the engine has to end: its requests go on elsewhere."""
    return isinstance(error, RankLost) or (
        isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Less work at once may succeed. torch's allocator for CPUs has no class of its own for that."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def explain(error: BaseException) -> str:
    """For the client of a sequence that fails alone, and for the operator."""
    first_line = str(error).strip().partition("\n")[0]
    name = type(error).__name__
    what = f"{name}: {first_line[:SHOWN]}" if first_line else name
    if is_out_of_memory(error):
        return (
            f"There was no memory to compute even a part of this sequence alone ({what}). Try again when the "
            "server is less busy; an operator can leave it more with a smaller --kv-cache-memory."
        )
    return (
        f"The engine failed on this sequence ({what}). If it does again, tell the operator: the log has the "
        "cause under the request's id."
    )
