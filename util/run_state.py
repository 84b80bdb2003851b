"""Parts of a training run, and saving and restoring their state."""

import re
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from util.checkpoint import get_rng_state, save_checkpoint, set_rng_state
from util.distributed.collectives import all_gather_object, get_rank, get_world_size, is_main_process
from util.distributed.parallel import gather, load_model_state, load_optimizer_state
from util.distributed.preemption import StopRequests
from util.ema import WeightAverage
from util.errors import UserError
from util.files import make_folder, or_warn, save_atomically
from util.logger import Meter, print_main
from util.precision import Precision
from util.run_entries import damage_named
from util.seeding import seed_everything


class ImageData(Protocol):
    """Part of `datasets.image_dataset.ImageDataset` that util reads."""

    class_map: Any
    federated: int

    @property
    def summary(self) -> str: ...

    def __len__(self) -> int: ...
    def __getitem__(self, idx: int) -> tuple[Tensor, dict[str, Tensor]]: ...


class Criterion(Protocol):
    """Losses by name, and counts that a checkpoint keeps."""

    tally: Counter[str]

    def __call__(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]: ...


class Schedule(Protocol):
    """Learning-rate schedule of `engine.build_scheduler`."""

    left_out: list[int]

    def __call__(self, step: int) -> float: ...
    def drops_after(self, epoch: int) -> bool: ...


@dataclass
class EpochState:
    """Progress within an epoch."""

    step: int = 0  # steps done, those left out included
    meter: Meter = field(default_factory=Meter)


@dataclass
class Run:
    """Parts of a run that the epoch loop uses."""

    args: Namespace
    model: nn.Module  # wrapped, if there are several processes
    criterion: Criterion
    postprocessors: dict[str, nn.Module]
    datasets: Mapping[str, ImageData]
    loaders: dict[str, DataLoader]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    precision: Precision
    average: WeightAverage | None = None
    stops: StopRequests | None = None

    @property
    def bare_model(self) -> nn.Module:
        return getattr(self.model, 'module', self.model)

    @property
    def best_model(self) -> nn.Module:
        """Return the model that is evaluated: the EMA, if there is one."""
        return self.bare_model if self.average is None else self.average.module

    @property
    def steps_an_epoch(self) -> int:
        return len(self.loaders['train']) // self.args.accum_steps

    @property
    def images_a_step(self) -> int:
        return self.args.batch_size * self.args.accum_steps * get_world_size()


def save(
    run: Run, folder: Path, epoch: int, metrics: dict | None = None, within: EpochState | None = None
) -> bool:
    """Write `checkpoint.pth` after an epoch, or in the middle of the one after `epoch`. All ranks must call it.

    Args:
        metrics: results of the epoch.
        within: progress of the unfinished epoch.

    Returns:
        False if it could not be written, for instance since the disk is full: that is said, and the former one stays.

    Raises:
        UserError: losses since the last reading are not finite; the former checkpoint stays.
    """
    own = {'rng': get_rng_state()}
    if within is not None:
        own |= {'meter': within.meter.state_dict(), 'tally': dict(run.criterion.tally)}
    everyone = all_gather_object(own)
    pending = [each['meter']['pending'] for each in everyone if within is not None]
    if any(values is not None and not values.isfinite().all() for values in pending):
        raise UserError('loss is not finite, stopping training; the last checkpoint is untouched')
    checkpoint = {
        'model': gather(run.bare_model.state_dict()),
        'optimizer': gather(run.optimizer.state_dict()),
        'lr_scheduler': run.scheduler.state_dict(),
        'epoch': epoch,
        'args': vars(run.args),
        'class_map': run.datasets['train'].class_map.to_dict(),
        'data': run.datasets['train'].summary,
        'rng': [each['rng'] for each in everyone],
    }
    if run.precision.state_dict():
        checkpoint['scaler'] = run.precision.state_dict()
    if run.average is not None:
        checkpoint['model_ema'] = gather(run.average.module.state_dict())
        checkpoint['ema_updates'] = run.average.num_updates
    if metrics is not None:
        checkpoint['metrics'] = metrics
    if within is not None:
        checkpoint['within_epoch'] = {
            'images': within.step * run.images_a_step,
            'meters': [each['meter'] for each in everyone],
            'tallies': [each['tally'] for each in everyone],
        }
    if is_main_process():
        try:
            save_checkpoint(folder / 'checkpoint.pth', checkpoint)
        except OSError as error:
            print(f'warning: {error}; the run goes on, and saves again later', flush=True)
            return False
    return True


def keep_copy(folder: Path, name: str) -> None:
    """Copy the newest checkpoint to another name."""
    with or_warn():
        save_atomically(folder / name, lambda path: shutil.copyfile(folder / 'checkpoint.pth', path))


def keep_numbered(run: Run, folder: Path, epoch: int) -> None:
    """Keep a numbered copy every --save_every epochs, and at learning-rate drops, if that flag is given.

    The oldest copies are removed if there are more than --keep_checkpoints.
    """
    args, schedule = run.args, cast(Schedule, run.scheduler.lr_lambdas[0])
    if not is_main_process() or args.save_every is None:
        return
    if (epoch + 1) % args.save_every and not schedule.drops_after(epoch):
        return
    keep_copy(folder, f'checkpoint{epoch:04}.pth')
    if args.keep_checkpoints is not None:
        names = (re.fullmatch(r'checkpoint(\d{4,})\.pth', path.name) for path in folder.iterdir())
        numbered = sorted((int(name[1]), name[0]) for name in names if name)
        for _, old in numbered[: max(len(numbered) - args.keep_checkpoints, 0)]:
            (folder / old).unlink()


def restore(run: Run, checkpoint: dict) -> tuple[int, EpochState]:
    """Restore everything but the model's own weights, which are loaded already.

    Files that hold weights only (official ones) start at epoch 0. The number of ranks may change: images that were
    seen are not seen again, if a step has as many as before. This does not hold for streams and --batches
    aspect, whose order depends on the ranks.

    Returns:
        The epoch to go on with, and the progress within it.

    Raises:
        UserError: the checkpoint has an average or an optimizer that this run has not, or other images.
    """
    if 'optimizer' not in checkpoint:
        return 0, EpochState()
    if run.average is None and 'model_ema' in checkpoint:
        raise UserError(
            f'{run.args.resume} averages the weights, and its average would be lost: give the --ema of its run'
        )
    with damage_named(run.args.resume, 'optimizer'):
        load_optimizer_state(run.optimizer, checkpoint['optimizer'])
    if 'scaler' in checkpoint:
        run.precision.load_state_dict(checkpoint['scaler'])
    if run.average is not None and 'model_ema' in checkpoint:
        with damage_named(run.args.resume, 'model_ema or ema_updates'):
            load_model_state(run.average.module, checkpoint['model_ema'])
            run.average.num_updates = checkpoint['ema_updates']
    epoch, state = checkpoint['epoch'] + 1, EpochState()
    check_data_of(run, checkpoint)
    if 'within_epoch' in checkpoint:
        state = restore_epoch(run, checkpoint['within_epoch'])
    (saved, *_) = checkpoint['lr_scheduler'].get('lr_lambdas') or [{}]
    cast(Schedule, run.scheduler.lr_lambdas[0]).left_out = saved.get('left_out', [])
    set_step(run.scheduler, epoch * run.steps_an_epoch + state.step)
    states = checkpoint.get('rng', [])
    if len(states) == get_world_size():
        with damage_named(run.args.resume, 'rng'):
            set_rng_state(states[get_rank()])
    else:  # another number of processes, or an official file: repeatable, though not as if undisturbed
        seed_everything(run.args.seed + get_rank() + 1000 * (epoch + 1) + state.step)
    return epoch, state


def check_data_of(run: Run, checkpoint: dict) -> None:
    """Compare the training images with those of a checkpoint, if it tells them.

    Raises:
        UserError: others are to go on in the middle of an epoch.
    """
    theirs, ours = checkpoint.get('data'), run.datasets['train'].summary
    if theirs in (None, ours):
        return
    text = f'{run.args.resume} was trained on {theirs}, and here are {ours}'
    if 'within_epoch' in checkpoint:
        raise UserError(
            f'{text}: the epoch cannot go on with other images; give those of its run, or start from its weights with --pretrained'
        )
    print_main(f'warning: {text}')


def set_step(scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Put a schedule, and the rates of its optimizer, to where they are after `step` steps of the run."""
    schedule = cast(Schedule, scheduler.lr_lambdas[0])
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    scheduler._last_lr = [base * schedule(step) for base in scheduler.base_lrs]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group['lr'] = rate


def restore_epoch(run: Run, saved: dict) -> EpochState:
    """Restore the progress within an epoch. A rank takes over the sums of its number, and of ranks that no longer exist."""
    state = EpochState(saved['images'] // run.images_a_step)
    device = next(run.model.parameters()).device
    names = saved['meters'][0]['names']
    state.meter.load_state_dict({'names': names, 'totals': dict.fromkeys(names, 0.0)}, device)
    for rank in range(get_rank(), len(saved['meters']), get_world_size()):
        meter = Meter()
        meter.load_state_dict(saved['meters'][rank], device)
        state.meter = meter if rank == get_rank() else state.meter.joined(meter)
        run.criterion.tally.update(saved['tallies'][rank])
    return state


def find_checkpoint(args: Namespace, restarted: bool) -> tuple[str, str]:
    """Create the output folder; return what to resume ('' if nothing), and path or address of the checkpoint to read.

    Args:
        restarted: a launcher has started this job again.

    Raises:
        UserError: the output folder holds another run, which would be overwritten.
    """
    resume = args.resume
    if args.output_dir and not (args.dry_run or args.check_data):
        existing = Path(args.output_dir) / 'checkpoint.pth'
        if restarted and existing.is_file() and not args.eval:
            resume = 'auto'  # the same command as at first, and this run's own checkpoint
        if resume == 'auto':
            resume = str(existing) if existing.is_file() else ''
            if args.eval and not resume:
                raise UserError(f'there is no checkpoint at {existing} to evaluate')
        elif (
            existing.is_file()
            and not args.eval
            and not (resume and Path(resume).resolve() == existing.resolve())
        ):
            raise UserError(
                f'{args.output_dir} holds the checkpoint of a run: add --resume auto to go on with it, or choose another '
                '--output_dir'
            )
        make_folder(args.output_dir)
    elif resume == 'auto':
        resume = ''
    return resume, resume or args.pretrained or args.frozen_weights or ''
