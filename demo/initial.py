"""Untrained weights that can already look back.

To copy a name, a model has to find where the name stood before and what came after it there. That takes two
heads in two layers (an "induction head": one tells every token what stood before it, the other looks for
tokens that came after the present one). Found by chance, this pair appears late and suddenly, after far
more tokens than a CPU can train on in an hour. So it is put in place at the start, and training only has to
refine it and learn when to use it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def rotations(config: LlamaConfig) -> Tensor:
    """Return by how much each pair of a head's dimensions turns from one position to the next."""
    half = config.hidden_size // config.num_attention_heads // 2
    theta: float = config.rope_parameters["rope_theta"]
    return theta ** (-torch.arange(half) / half)


@torch.no_grad()
def look_back(model: LlamaForCausalLM) -> None:
    """Put an induction head into the first two layers of an untrained model.

    Dimension 0 of the embeddings is the same for all tokens (as the output layer is tied to them, this
    moves all logits alike and changes nothing); a query that depends on it alone depends on the position
    alone. The next ``size`` dimensions are empty in the embeddings and take in what is known about the
    token before.
    """
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    size = width // heads
    group = heads // config.num_key_value_heads
    turn = rotations(config)
    embeddings = model.model.embed_tokens.weight
    content = slice(1 + size, width)
    embeddings[:, : 1 + size] = 0
    embeddings[:, 0] = embeddings.norm(dim=1).mean() * 0.7
    # What a token looks like, in as many dimensions as a head has.
    look = torch.zeros(size, width)
    look[:, content] = nn.init.orthogonal_(torch.empty(size, width - 1 - size))

    # First layer: attend to the position before, and put the look of its token into the empty dimensions.
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    fast = turn > 0.05
    strength = 0.9
    for head in range(group):
        query = first.q_proj.weight[head * size : (head + 1) * size]
        query.zero_()
        query[: size // 2, 0] = strength * torch.cos(turn) * fast
        query[size // 2 :, 0] = -strength * torch.sin(turn) * fast
    key = first.k_proj.weight[:size]
    key.zero_()
    key[: size // 2, 0] = strength * fast
    first.v_proj.weight[:size] = look
    first.o_proj.weight[1 : 1 + size, :size] = 0.08 * torch.eye(size)

    # Second layer: attend to tokens that came after one that looks like the present one, and write what
    # they are. Dimensions that turn fast say where a token is, not what it is, so they are left out.
    slow = (turn < 0.03).repeat(2).float()[:, None]
    for head in range(group):
        second.q_proj.weight[head * size : (head + 1) * size] = slow * look
    key = second.k_proj.weight[:size]
    key.zero_()
    key[:, 1 : 1 + size] = slow * torch.eye(size)
    second.v_proj.weight[:size] = look
    second.o_proj.weight[:, :size] = 0.4 * look.T


def looks_back(model: LlamaForCausalLM, length: int = 24, rows: int = 16) -> tuple[float, float]:
    """Return the loss on random tokens seen for the first and for the second time."""
    tokens = torch.randint(3, model.config.vocab_size, (rows, length)).repeat(1, 2)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    return losses[:, : length - 1].mean().item(), losses[:, length:].mean().item()
