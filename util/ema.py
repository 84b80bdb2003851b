"""Exponential moving average of the weights (EMA), which is smoother than the weights and usually the better detector."""

import copy
import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """Copy of a model that holds the EMA of its weights.

    An update moves the copy by 1 - decay; the n-th one by 9 / (10 + n) if that is more, so that initial values are
    forgotten early. With `warmup`, the n-th moves it by the mean of 1 - decay and 1, weighted with 1 - exp(-n / warmup) and
    exp(-n / warmup) (mmdetection's exponential momentum). Floating-point buffers are averaged too, counters copied. (PyTorch's AveragedModel counts on the
    device, and waits for it in every step.)
    """

    def __init__(self, model: nn.Module, decay: float, warmup: int = 0) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.warmup, self.num_updates = decay, warmup, 0

    def step_size(self) -> float:
        """Return the share of the weights in the average of the update that is counted last."""
        number = self.num_updates
        if self.warmup:
            early = math.exp(-number / self.warmup)
            return early + (1 - early) * (1 - self.decay)
        return 1 - min(self.decay, (1 + number) / (10 + number))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.num_updates += 1
        step = self.step_size()
        ours, theirs = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        pairs = [(x, y.detach()) for x, y in zip(ours, theirs, strict=True) if x.is_floating_point()]
        for cut in (False, True):  # whole tensors and parts (FSDP2) cannot be moved in one call
            alike = [pair for pair in pairs if isinstance(pair[0], DTensor) == cut]
            if alike:
                torch._foreach_lerp_([x for x, _ in alike], [y for _, y in alike], step)
        for x, y in zip(ours, theirs, strict=True):
            if not x.is_floating_point():
                x.copy_(y)
