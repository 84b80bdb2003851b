"""How weights change in training: optimizers, their parameter groups, the learning-rate schedule, and the moving
average of the weights (EMA).
"""

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from util.config.settle import Settled
from util.errors import UserError

Places = list[tuple[dict[str, Any], str]]


def build_adamw(groups: list[dict], **options: Any) -> Optimizer:
    return AdamW(groups, **options)


def build_sgd(groups: list[dict], fused: bool, **options: Any) -> Optimizer:
    # PyTorch has no fused SGD for parts of weights, and steps them one by one where some are whole.
    sharded = any(isinstance(p, DTensor) for group in groups for p in group['params'])
    return SGD(groups, momentum=0.9, **options, **({'foreach': False} if sharded else {'fused': fused}))


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {'adamw': build_adamw, 'sgd': build_sgd}


def build_optimizer(
    model: nn.Module,
    lr: float,
    lr_backbone: float,
    weight_decay: float,
    backbone_names: Sequence[str] = ('backbone',),
    slow_names: Sequence[str] = (),
    slow_factor: float = 0.1,
    optimizer: str = 'adamw',
    layer_decay: float | None = None,
) -> Optimizer:
    """Build one of `OPTIMIZERS` with the official parameter groups.

    The backbone learns at `lr_backbone`, parameters of `slow_names` at `lr * slow_factor`, the rest at `lr`. A parameter belongs
    to a group if its name contains one of the group's names.

    layer_decay: factor of `layer_decay_groups`, which then makes the groups.

    Raises:
        UserError: a parameter belongs to two groups.
    """
    params: dict[str, list[nn.Parameter]] = {'rest': [], 'backbone': [], 'slow': []}
    for name, parameter in model.named_parameters():
        found = [
            group
            for group, parts in (('backbone', backbone_names), ('slow', slow_names))
            if any(part in name for part in parts)
        ]
        if len(found) == 2:
            raise UserError(
                f'{name} fits --lr_backbone_names {" ".join(backbone_names)} and --lr_linear_proj_names '
                f'{" ".join(slow_names)}: make the names disjoint'
            )
        if parameter.requires_grad:
            params[found[0] if found else 'rest'].append(parameter)
    rates = {'rest': lr, 'backbone': lr_backbone, 'slow': lr * slow_factor}
    if not slow_names:
        del rates['slow']
    groups: list[dict] = [{'params': params[group], 'lr': rate} for group, rate in rates.items()]
    if layer_decay is not None:
        groups = layer_decay_groups(model, lr, weight_decay, layer_decay)
    fused = all(p.device.type in ('cpu', 'cuda', 'mps') for p in model.parameters())
    return OPTIMIZERS[optimizer](groups, lr=lr, weight_decay=weight_decay, fused=fused)


def layer_decay_groups(model: nn.Module, lr: float, weight_decay: float, factor: float) -> list[dict]:
    """Return parameter groups whose rate falls by `factor` with each block of a ViT (Co-DETR; BEiT, arXiv:2106.08254).

    All that is no block and no embedding learns at `lr`. Biases, norms and other vectors are not decayed. The first group
    is the rest of the model, the second the backbone's last block.
    """
    body, prefix = cast(Any, model).backbone[0].body, 'backbone.0.body.'
    last = len(body.units()) + 1
    groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = body.layer_of(name.removeprefix(prefix)) if name.startswith(prefix) else last
        groups.setdefault((parameter.ndim == 1 or name.endswith('.bias'), -layer), []).append(parameter)
    return [
        {
            'params': groups[key],
            'lr': lr * factor ** (last + key[1]),
            'weight_decay': 0.0 if key[0] else weight_decay,
        }
        for key in sorted(groups)
    ]


def build_schedule(args: Settled, model: nn.Module, steps_per_epoch: int) -> 'Schedule':
    """Build the optimizer that settled flags ask for, and its learning rates."""
    optimizer = build_optimizer(
        model,
        lr=args.lr,
        lr_backbone=args.lr_backbone,
        weight_decay=args.weight_decay,
        backbone_names=args.lr_backbone_names,
        slow_names=args.lr_linear_proj_names,
        slow_factor=args.lr_linear_proj_mult,
        optimizer='sgd' if args.sgd else 'adamw',
        layer_decay=args.lr_layer_decay,
    )
    drops, warmup = args.lr_drop_epochs or (), (args.warmup_steps, args.warmup_start)
    return Schedule(optimizer, args.lr_schedule, args.epochs, args.lr_drop, drops, *warmup, steps_per_epoch)


def step_factor(schedule: 'Schedule', step: int) -> float:
    return 0.1 ** schedule.num_drops(step // schedule.steps_per_epoch)


def cosine_factor(schedule: 'Schedule', step: int) -> float:
    """SGDR (arXiv:1608.03983), Eq. 5, without restarts."""
    done = min(step / (schedule.epochs * schedule.steps_per_epoch), 1.0)
    return 0.5 * (1 + math.cos(math.pi * done))


SCHEDULES: dict[str, Callable[['Schedule', int], float]] = {'step': step_factor, 'cosine': cosine_factor}


@dataclass
class Schedule:
    """Learning rates of an optimizer at each step of a run; skipped steps count.

    kind: `step` multiplies by 0.1 after the epochs of `drops`, or after every `drop_every`; `cosine` falls to 0 over `epochs`.
    Both follow the images that were seen. warmup_steps: over the first of them that the optimizer makes, the rate rises
    linearly from `warmup_start`.
    """

    optimizer: Optimizer
    kind: str
    epochs: int
    drop_every: int
    drops: Sequence[int] = ()
    warmup_steps: int = 0
    warmup_start: float = 0.0
    steps_per_epoch: int = 1
    skipped: list[int] = field(default_factory=list)  # numbers of the steps that the optimizer did not make

    def __post_init__(self) -> None:
        self.base_rates = [group['lr'] for group in self.optimizer.param_groups]
        self.move_to(0)

    def factor(self, step: int) -> float:
        """Return the factor of all rates at a step of the run."""
        warm, made = 1.0, step - bisect_left(self.skipped, step)
        if self.warmup_start and made < self.warmup_steps:
            warm = self.warmup_start + (1 - self.warmup_start) * made / self.warmup_steps
        elif self.warmup_steps:
            warm = min(1.0, (made + 1) / self.warmup_steps)
        return warm * SCHEDULES[self.kind](self, step)

    def rates(self, step: int) -> list[float]:
        """Return the learning rate of each parameter group at a step of the run."""
        return [rate * self.factor(step) for rate in self.base_rates]

    def move_to(self, step: int) -> None:
        """Set the optimizer's rates to those of a step of the run."""
        for group, rate in zip(self.optimizer.param_groups, self.rates(step), strict=True):
            group['lr'] = rate

    def num_drops(self, epochs_done: int) -> int:
        if self.kind != 'step':
            return 0
        if self.drops:
            return sum(epochs_done >= epoch for epoch in self.drops)
        return epochs_done // self.drop_every

    def drops_after(self, epoch: int) -> bool:
        """Return whether the rate is divided at the end of this epoch, counted from 0."""
        return self.num_drops(epoch + 1) > self.num_drops(epoch)

    def state_dict(self) -> dict:
        return {'skipped': list(self.skipped)}

    def load_state_dict(self, state: dict) -> None:
        """Take over skipped steps. Older checkpoints hold them in the state of a LambdaLR, official files nowhere."""
        (old, *_) = state.get('lr_lambdas') or [{}]
        self.skipped = list(state.get('skipped', old.get('left_out', [])))

    def __str__(self) -> str:
        warm = f'warm-up over {self.warmup_steps} steps, ' if self.warmup_steps else ''
        if self.kind != 'step':
            return f'{warm}{self.kind} to 0 over {self.epochs} epochs'
        if self.drops:
            return f'{warm}divided by 10 after epochs {" ".join(map(str, sorted(self.drops)))}'
        return f'{warm}divided by 10 every {self.drop_every} epochs'


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
