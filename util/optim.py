"""How weights change in training: frozen parameters, optimizers, parameter groups, learning rates, and the
EMA.
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

from util.config.settle import PLACES, Settled
from util.errors import UserError

Slots = list[tuple[dict[str, Any], str]]


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze parameters by words between the dots of their names, such as `backbone` or `decoder.layers.0`.

    Raises:
        UserError: no parameter has such a name, no parameter is left to train, or the statistics of a batch
            norm would still change.
    """
    for name in names:
        parameters = [p for full, p in model.named_parameters() if f'.{name}.' in f'.{full}.']
        if not parameters:
            words = sorted({full.split('.')[0] for full, _ in model.named_parameters()} | set(PLACES))
            raise UserError(
                f'--freeze {name}: no parameter has this in its name; there are {", ".join(words)}'
            )
        for parameter in parameters:
            parameter.requires_grad_(False)
    if names and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f'--freeze {" ".join(names)} leaves nothing to train: name fewer parts')
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if names and any(not norm.weight.requires_grad for norm in norms):
        raise UserError(
            f'--freeze {" ".join(names)}: the statistics of batch norms would still change: add '
            '--backbone_norm frozen'
        )


def build_adamw(groups: list[dict], **options: Any) -> Optimizer:
    return AdamW(groups, **options)


def build_sgd(groups: list[dict], fused: bool, **options: Any) -> Optimizer:
    # PyTorch has no fused SGD for sharded weights; foreach would step them one by one where some are whole.
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

    The learning rate of the backbone is `lr_backbone`, that of `slow_names` is `lr * slow_factor`, that of
    all others is `lr`. A parameter belongs to a group if its name contains one of the group's names.

    layer_decay: factor of `layer_decay_groups`, which then makes the groups.

    Raises:
        UserError: a parameter belongs to two groups.
    """
    params: dict[str, list[nn.Parameter]] = {'rest': [], 'backbone': [], 'slow': []}
    names = {'backbone': backbone_names, 'slow': slow_names}
    for name, parameter in model.named_parameters():
        matches = [group for group, parts in names.items() if any(part in name for part in parts)]
        if len(matches) == 2:
            raise UserError(
                f'{name} fits --lr_backbone_names {" ".join(backbone_names)} and --lr_linear_proj_names '
                f'{" ".join(slow_names)}: make the names disjoint'
            )
        if parameter.requires_grad:
            params[matches[0] if matches else 'rest'].append(parameter)
    rates = {'rest': lr, 'backbone': lr_backbone, 'slow': lr * slow_factor}
    if not slow_names:
        del rates['slow']
    groups: list[dict] = [{'params': params[group], 'lr': rate} for group, rate in rates.items()]
    if layer_decay is not None:
        groups = layer_decay_groups(model, lr, weight_decay, layer_decay)
    fused = all(p.device.type in ('cpu', 'cuda', 'mps') for p in model.parameters())
    return OPTIMIZERS[optimizer](groups, lr=lr, weight_decay=weight_decay, fused=fused)


def layer_decay_groups(model: nn.Module, lr: float, weight_decay: float, factor: float) -> list[dict]:
    """Return parameter groups whose rate falls by `factor` with each block of a ViT (arXiv:2106.08254).

    The rate of all modules outside the blocks and the embedding is `lr`. Biases, norms and other vectors have
    no weight decay. The first group is the rest of the model, the second one the last block of the backbone.
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
    """Build the optimizer of settled flags, and the schedule of its learning rates."""
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
    """Learning rates of an optimizer at each step of a run.

    kind: `step` multiplies by 0.1 after the epochs of `drops`, or after every `drop_every` epochs; `cosine`
    falls to 0 over `epochs`. Both count skipped steps too. warmup_steps: number of steps, without skipped
    ones, over which the rate rises linearly from `warmup_start`.
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
        """Load the skipped steps. Older checkpoints have them in a LambdaLR, official files not at all."""
        (lambda_state, *_) = state.get('lr_lambdas') or [{}]
        self.skipped = list(state.get('skipped', lambda_state.get('left_out', [])))

    def __str__(self) -> str:
        warm = f'warm-up over {self.warmup_steps} steps, ' if self.warmup_steps else ''
        if self.kind != 'step':
            return f'{warm}{self.kind} to 0 over {self.epochs} epochs'
        if self.drops:
            return f'{warm}divided by 10 after epochs {" ".join(map(str, sorted(self.drops)))}'
        return f'{warm}divided by 10 every {self.drop_every} epochs'


class WeightAverage:
    """Exponential moving average (EMA) of the weights of a model, kept in a copy of it.

    An update moves the copy by 1 - decay; the n-th update by 9 / (10 + n) if that is more, so that initial
    values are forgotten early. With `warmup`, the n-th update moves it by the mean of 1 - decay and 1,
    weighted with 1 - exp(-n / warmup) and exp(-n / warmup) (mmdetection's exponential momentum).
    Floating-point buffers are averaged too, counters are copied. (PyTorch's AveragedModel counts on the
    device, and waits for it in every step.)
    """

    def __init__(self, model: nn.Module, decay: float, warmup: int = 0) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.warmup, self.num_updates = decay, warmup, 0
        self.source: nn.Module | None = None

    def step_size(self) -> float:
        """Return the weight of the model in the last counted update."""
        number = self.num_updates
        if self.warmup:
            early = math.exp(-number / self.warmup)
            return early + (1 - early) * (1 - self.decay)
        return 1 - min(self.decay, (1 + number) / (10 + number))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards a model with the same modules."""
        self.num_updates += 1
        step = self.step_size()
        if self.source is not model:
            self.source, self.slots = model, [tensor_slots(m) for m in (self.module, model)]
        pairs = list(zip(*map(read_slots, self.slots), strict=True))
        for sharded in (False, True):  # whole and sharded tensors (FSDP2) cannot be moved in one call
            group = [(x, y) for x, y in pairs if x.is_floating_point() and isinstance(x, DTensor) == sharded]
            if group:
                torch._foreach_lerp_([x for x, _ in group], [y for _, y in group], step)
        for x, y in pairs:
            if not x.is_floating_point():
                x.copy_(y)


def tensor_slots(model: nn.Module) -> Slots:
    """Return the dictionaries and keys of the parameters and buffers of a model.

    A walk through its modules takes longer than an update. The tensors themselves may be replaced, as by
    `.to()`, FSDP2 or `load_state_dict(assign=True)`.
    """
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    return [(table, name) for table in tables for name, value in table.items() if value is not None]


def read_slots(slots: Slots) -> list[Tensor]:
    """Return the tensors of some slots, shared tensors once."""
    return list({id(tensor): tensor for tensor in (table[name] for table, name in slots)}.values())
