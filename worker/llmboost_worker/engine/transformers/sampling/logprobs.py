"""Log probabilities of the model's own distribution, before anything that a request changes in it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmboost_worker.engine.interface import TokenLogprobs
from llmboost_worker.engine.transformers.sampling.filters import largest


def logprobs(logits: Tensor, tokens: Tensor, wanted: Sequence[int]) -> list[TokenLogprobs]:
    """Of one token per row, and of each row's most likely ones.

    Args:
        logits: [rows, vocabulary], float32
        tokens: [rows], int64
        wanted: how many of the most likely, per row

    Returns:
        one per row, in one transfer from the device
    """
    k = min(max(wanted), logits.shape[1])
    norm = logits.logsumexp(1, keepdim=True)
    values, ids = largest(logits, k) if k else (logits[:, :0], tokens[:, None][:, :0])
    of_token = logits.gather(1, tokens[:, None])
    # As float64, which holds both: ids are whole numbers below 2^53.
    table = torch.cat([(of_token - norm).double(), (values - norm).double(), ids.double()], dim=1).tolist()
    return [
        TokenLogprobs(
            row[0],
            tuple(zip(map(int, row[1 + k : 1 + k + count]), row[1 : 1 + min(count, k)], strict=True)),
        )
        for row, count in zip(table, wanted, strict=True)
    ]
