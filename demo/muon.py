"""Muon, an optimizer for the matrices of a model, its work shared among the processes that train."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al., 2024), for models that see few tokens.

    All matrices of one shape are worked on as one batch, in float32, which on a CPU is much quicker than
    one by one.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        """Take the matrices to train."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @staticmethod
    def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
        """Return the nearest (nearly) orthogonal matrices by Newton-Schulz iteration."""
        flip = x.shape[-2] > x.shape[-1]
        if flip:
            x = x.mT
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(steps):
            square = x @ x.mT
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return x.mT if flip else x

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Make one step."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]))
                # Every worker makes its share of the matrices orthogonal; their sum is the whole.
                stacked = torch.stack(updates)
                result = torch.zeros_like(stacked)
                mine = slice(dist.get_rank(), None, dist.get_world_size())
                if len(stacked[mine]):
                    result[mine] = self.orthogonal(stacked[mine])
                dist.all_reduce(result)
                # Scaled so that an update is as large as AdamW's and one learning rate suits every shape.
                scale = 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, result, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)
