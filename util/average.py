"""A moving average of the weights (EMA): smoother than the weights themselves, and usually the better detector."""

import copy

import torch
from torch import nn


class WeightAverage:
    """A copy of a model that follows it.

    Each update moves the copy by 1 - decay; the n-th one by 9 / (10 + n) where that is more, so that initial values are
    forgotten early. Buffers are averaged too, counters copied. (PyTorch's AveragedModel counts on the device, and waits for
    it in every step.)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.num_updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.num_updates += 1
        step = 1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        ours, theirs = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        moving = [x.is_floating_point() for x in ours]
        torch._foreach_lerp_(
            [x for x, moves in zip(ours, moving, strict=True) if moves],
            [x.detach() for x, moves in zip(theirs, moving, strict=True) if moves],
            step,
        )
        for x, y, moves in zip(ours, theirs, moving, strict=True):
            if not moves:
                x.copy_(y)
