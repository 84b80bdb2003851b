"""Exponential moving average of the weights (EMA), which is smoother than the weights and usually the better detector."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Places = list[tuple[dict[str, Any], str]]


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
        self.followed: nn.Module | None = None

    def step_size(self) -> float:
        """Return the share of the weights in the average of the update that is counted last."""
        number = self.num_updates
        if self.warmup:
            early = math.exp(-number / self.warmup)
            return early + (1 - early) * (1 - self.decay)
        return 1 - min(self.decay, (1 + number) / (10 + number))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards a model, the same one each time or one built alike."""
        self.num_updates += 1
        step = self.step_size()
        if self.followed is not model:
            self.followed, self.places = model, [places_of(m) for m in (self.module, model)]
        pairs = list(zip(*map(tensors_at, self.places), strict=True))
        for cut in (False, True):  # whole tensors and parts (FSDP2) cannot be moved in one call
            alike = [(x, y) for x, y in pairs if x.is_floating_point() and isinstance(x, DTensor) == cut]
            if alike:
                torch._foreach_lerp_([x for x, _ in alike], [y for _, y in alike], step)
        for x, y in pairs:
            if not x.is_floating_point():
                x.copy_(y)


def places_of(model: nn.Module) -> Places:
    """Return where the parameters and buffers of a model stand: walking through its modules takes longer than moving them.

    What stands there may be replaced, as by `.to()`, FSDP2 or `load_state_dict(assign=True)`.
    """
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    return [(table, name) for table in tables for name, value in table.items() if value is not None]


def tensors_at(places: Places) -> list[Tensor]:
    """Return the tensors at some places, shared ones once."""
    return list({id(tensor): tensor for tensor in (table[name] for table, name in places)}.values())
