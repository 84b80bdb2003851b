"""A run: its parts, its progress, and how it is saved and restored."""

import re
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from util.config.recorded import as_json
from util.config.settle import Settled
from util.distributed.collectives import (
    all_gather_object,
    check_agreement,
    fail_together,
    get_rank,
    get_world_size,
    is_main_process,
)
from util.distributed.parallel import gather, load_model_state, load_optimizer_state
from util.distributed.preemption import Interrupted, StopRequests
from util.errors import FileError, UserError
from util.files import (
    code_checksum,
    lock_folder,
    make_folder,
    or_warn,
    remove_partial_files,
    save_atomically,
    save_checkpoint,
)
from util.logger import Meter, RunLog, print_main
from util.nan_guard import NonFiniteGuard
from util.optim import Schedule, WeightAverage
from util.precision import Precision
from util.run_entries import damage_named
from util.seeding import get_rng_state, seed_everything, set_rng_state
from util.trackers import Tracker, build_trackers
from util.visualize import plot_curves


class ImageData(Protocol):
    """Part of `datasets.image_dataset.ImageDataset` that a run reads."""

    class_map: Any
    federated: int

    @property
    def summary(self) -> str: ...

    def __len__(self) -> int: ...
    def __getitem__(self, idx: int) -> tuple[Tensor, dict[str, Tensor]]: ...


class Criterion(Protocol):
    """Losses by name, and counts that a checkpoint keeps."""

    pair_counts: Counter[str]

    def __call__(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]: ...


@dataclass
class EpochState:
    """Progress within an epoch."""

    step: int = 0  # steps done, skipped ones included
    meter: Meter = field(default_factory=Meter)


@dataclass
class Run:
    """A training or evaluation: its parts and its progress. `checkpoint.pth` in its folder holds both."""

    args: Settled
    model: nn.Module  # wrapped, if there are several processes
    criterion: Criterion
    postprocessors: dict[str, nn.Module]
    datasets: Mapping[str, ImageData]
    loaders: dict[str, DataLoader]
    schedule: Schedule  # with the optimizer whose rates it sets
    precision: Precision
    stops: StopRequests
    average: WeightAverage | None = None
    epoch: int = 0  # number of complete epochs
    state: EpochState = field(default_factory=EpochState)  # of the next epoch
    metrics: dict | None = None  # of the last complete epoch in a resumed run
    saved: bool = True  # checkpoint.pth is that of the last complete epoch
    log: RunLog | None = None
    trackers: list[Tracker] = field(default_factory=list)

    def __post_init__(self) -> None:
        args = self.args
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.guard = NonFiniteGuard(None if args.fsdp else self.folder, args.bad_steps, vars(args))

    @property
    def optimizer(self) -> Optimizer:
        return self.schedule.optimizer

    @property
    def bare_model(self) -> nn.Module:
        return getattr(self.model, 'module', self.model)

    @property
    def best_model(self) -> nn.Module:
        """Return the model that is evaluated: the EMA, if there is one."""
        return self.bare_model if self.average is None else self.average.module

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loaders['train']) // self.args.accum_steps

    @property
    def images_per_step(self) -> int:
        return self.args.batch_size * self.args.accum_steps * get_world_size()

    @property
    def checkpoint_path(self) -> Path:
        assert self.folder is not None
        return self.folder / 'checkpoint.pth'

    def open_logs(self) -> bool:
        """Open log files and trackers. Return whether the last epoch is missing in the log."""
        if self.folder is None:
            return False
        self.log = RunLog(self.folder, self.epoch)
        if is_main_process():
            self.trackers = build_trackers(self.folder, vars(self.args))
            with or_warn():
                save_atomically(self.folder / 'flags.json', lambda path: path.write_text(as_json(self.args)))
        if self.epoch == 0 or self.metrics is None or self.log.has_epoch(self.epoch):
            return False
        if Path(self.args.resume).resolve() != self.checkpoint_path.resolve():
            self.save(self.metrics)
        self.keep_numbered()
        return True

    def end_step(self, made: bool) -> None:
        """Move the schedule, update the EMA, save every --checkpoint_steps, and stop after a signal.

        made: the optimizer made this step. EMA and warm-up do not count a skipped step, but the epoch does.
        """
        args, steps_done = self.args, self.epoch * self.steps_per_epoch + self.state.step
        if not made:
            self.schedule.skipped.append(steps_done - 1)
        elif self.average is not None:
            self.average.update(self.bare_model)
        self.schedule.move_to(steps_done)
        due = self.folder and args.checkpoint_steps and self.state.step % args.checkpoint_steps == 0
        if due and self.state.step < self.steps_per_epoch:
            self.save()
        try:
            self.stops.check()
        except Interrupted:
            if self.folder and self.save():
                print_main(f'asked to stop: saved after step {self.state.step} of epoch {self.epoch + 1}')
            raise

    def end_epoch(self, metrics: dict) -> None:
        """Count an epoch, and save the run with its metrics."""
        self.epoch, self.state = self.epoch + 1, EpochState()
        self.saved = self.folder is None or self.save(metrics)
        if self.folder and self.saved:
            self.keep_numbered()

    def out_of_patience(self, best: str) -> bool:
        """Return whether --patience evaluations have not improved the main metric of this name."""
        patience = self.args.patience
        if not patience or not self.log or self.log.evaluations_since_best(best) < patience:
            return False
        name = best.removeprefix('test_')
        print_main(f'no better {name} in {patience} evaluations: stopping after {self.epoch} epochs')
        return True

    def check_saved(self) -> None:
        """Raise a FileError if the checkpoint is not that of the last epoch."""
        if not self.saved:
            raise FileError(
                f'{self.checkpoint_path} is not that of the last epoch: free some space, and go on with '
                '--resume auto'
            )

    def log_epoch(self, row: dict[str, float], record: dict, best: str, curves: Sequence[str]) -> None:
        """Log the last epoch, draw the curves, and keep its checkpoint if it is the best.

        Args:
            row: numbers of the epoch. record: JSON values.
            best: name of the main metric, whose largest value is the best. Without it the epoch was not
                evaluated.
            curves: names of the numbers that are drawn.
        """
        if self.log:
            evaluated = is_main_process() and best in row
            if evaluated and self.saved and row[best] > self.log.best(best):
                self.keep_copy('checkpoint_best.pth')
            with or_warn():
                self.log.append(row, record)
                if evaluated:
                    plot_curves(self.checkpoint_path.with_name('curves.png'), self.log.rows, curves)
        for tracker in self.trackers:
            with or_warn():
                tracker.add(self.epoch, row)

    def save(self, metrics: dict | None = None) -> bool:
        """Write `checkpoint.pth`, after an epoch or within one. All ranks must call it.

        Args:
            metrics: results of the last epoch.

        Returns:
            False if it could not be written, for instance because the disk is full. Then a warning is
            printed, and the former checkpoint stays.

        Raises:
            UserError: losses of the current window are not finite; the former checkpoint stays.
        """
        checkpoint = self.state_dict(metrics)
        if is_main_process():
            try:
                save_checkpoint(self.checkpoint_path, checkpoint)
            except OSError as error:
                print(f'warning: {error}; the run goes on, and saves again later', flush=True)
                return False
        return True

    def state_dict(self, metrics: dict | None) -> dict:
        """Return the entries of a checkpoint, on the CPU. All ranks must call it."""
        within_epoch = self.state.step > 0
        rank_state: dict = {'rng': get_rng_state()}
        if within_epoch:
            meter = self.state.meter.state_dict()
            rank_state |= {'meter': meter, 'tally': dict(self.criterion.pair_counts)}
        ranks = all_gather_object(rank_state)
        pending = [rank['meter']['pending'] for rank in ranks if within_epoch]
        if any(values is not None and not values.isfinite().all() for values in pending):
            raise UserError('loss is not finite, stopping training; the last checkpoint is untouched')
        data = self.datasets['train']
        checkpoint = {
            'model': gather(self.bare_model.state_dict()),
            'optimizer': gather(self.optimizer.state_dict()),
            'lr_scheduler': self.schedule.state_dict(),
            'epoch': self.epoch - 1,
            'args': vars(self.args),
            'class_map': data.class_map.to_dict(),
            'data': data.summary,
            'rng': [rank['rng'] for rank in ranks],
        }
        if scaler := self.precision.state_dict():
            checkpoint['scaler'] = scaler
        if self.average is not None:
            checkpoint['model_ema'] = gather(self.average.module.state_dict())
            checkpoint['ema_updates'] = self.average.num_updates
        if metrics is not None:
            checkpoint['metrics'] = metrics
        if within_epoch:
            checkpoint['within_epoch'] = {
                'images': self.state.step * self.images_per_step,
                'meters': [rank['meter'] for rank in ranks],
                'tallies': [rank['tally'] for rank in ranks],
            }
        return checkpoint

    def keep_copy(self, name: str) -> None:
        """Copy the newest checkpoint to another name."""
        with or_warn():
            path = self.checkpoint_path
            save_atomically(path.with_name(name), lambda copy: shutil.copyfile(path, copy))

    def keep_numbered(self) -> None:
        """Keep a numbered copy every --save_every epochs and at drops of the rate, if that flag is given.

        The oldest copies are removed if there are more than --keep_checkpoints.
        """
        args = self.args
        if not is_main_process() or args.save_every is None:
            return
        if self.epoch % args.save_every and not self.schedule.drops_after(self.epoch - 1):
            return
        self.keep_copy(f'checkpoint{self.epoch - 1:04}.pth')
        if args.keep_checkpoints is not None:
            files = self.checkpoint_path.parent.iterdir()
            names = (re.fullmatch(r'checkpoint(\d{4,})\.pth', path.name) for path in files)
            numbered = sorted((int(name[1]), name[0]) for name in names if name)
            for _, old in numbered[: max(len(numbered) - args.keep_checkpoints, 0)]:
                self.checkpoint_path.with_name(old).unlink()

    def restore(self, checkpoint: dict) -> None:
        """Restore everything but the weights of the model, which are loaded already.

        A file with weights only (an official one) starts at epoch 0. The number of ranks may differ. Then no
        image of an epoch is seen twice, if a step has the same number of images; this does not hold for
        streams and --batches aspect, whose order depends on the ranks.

        Raises:
            UserError: the checkpoint has an average or an optimizer that this run does not have, or other
                images.
        """
        name = self.args.resume
        if 'optimizer' not in checkpoint:
            return
        if self.average is None and 'model_ema' in checkpoint:
            raise UserError(
                f'{name} averages the weights, and its average would be lost: give the --ema of its run'
            )
        with damage_named(name, 'optimizer'):
            load_optimizer_state(self.optimizer, checkpoint['optimizer'])
        if 'scaler' in checkpoint:
            self.precision.load_state_dict(checkpoint['scaler'])
        if self.average is not None and 'model_ema' in checkpoint:
            with damage_named(name, 'model_ema or ema_updates'):
                load_model_state(self.average.module, checkpoint['model_ema'])
                self.average.num_updates = checkpoint['ema_updates']
        self.epoch, self.metrics = checkpoint['epoch'] + 1, checkpoint.get('metrics')
        self.check_data(checkpoint)
        if 'within_epoch' in checkpoint:
            self.restore_epoch(checkpoint['within_epoch'])
        self.schedule.load_state_dict(checkpoint['lr_scheduler'])
        self.schedule.move_to(self.epoch * self.steps_per_epoch + self.state.step)
        states = checkpoint.get('rng', [])
        if len(states) == get_world_size():
            with damage_named(name, 'rng'):
                set_rng_state(states[get_rank()])
        else:  # another number of processes, or an official file: repeatable, but with other numbers
            seed_everything(self.args.seed + get_rank() + 1000 * (self.epoch + 1) + self.state.step)

    def check_data(self, checkpoint: dict) -> None:
        """Compare the training images with those of a checkpoint.

        Raises:
            UserError: other images would continue an epoch.
        """
        recorded, summary = checkpoint.get('data'), self.datasets['train'].summary
        if recorded in (None, summary):
            return
        text = f'{self.args.resume} was trained on {recorded}, and here are {summary}'
        if 'within_epoch' in checkpoint:
            raise UserError(
                f'{text}: the epoch cannot go on with other images; give those of its run, or start from its '
                'weights with --pretrained'
            )
        print_main(f'warning: {text}')

    def restore_epoch(self, saved: dict) -> None:
        """Restore the progress within an epoch. A rank adds the sums of ranks that no longer exist."""
        self.state = EpochState(saved['images'] // self.images_per_step)
        device = next(self.model.parameters()).device
        names = saved['meters'][0]['names']
        self.state.meter.load_state_dict({'names': names, 'totals': dict.fromkeys(names, 0.0)}, device)
        for rank in range(get_rank(), len(saved['meters']), get_world_size()):
            meter = Meter()
            meter.load_state_dict(saved['meters'][rank], device)
            self.state.meter = meter if rank == get_rank() else self.state.meter.joined(meter)
            self.criterion.pair_counts.update(saved['tallies'][rank])


def check_same_start(flags: Namespace) -> None:
    """Require that all processes were started with the same flags and code.

    Raises:
        UserError: they differ.
    """
    may_differ = ('device', 'num_workers')
    facts = {f'--{name}': value for name, value in vars(flags).items() if name not in may_differ}
    code = code_checksum(Path(__file__).parents[1])
    check_agreement(facts | {'PyTorch': torch.__version__, 'the code': code})


def find_checkpoint(output_dir: str, resume: str, evaluate: bool, restarted: bool) -> str:
    """Create the output folder; return the checkpoint to resume or evaluate, '' if there is none.

    Args:
        resume: path or URL, '', or `auto` for the checkpoint of the folder, if it has one.
        restarted: a launcher has started this job again.

    Raises:
        UserError: the output folder holds another run, which would be overwritten.
    """
    existing = Path(output_dir) / 'checkpoint.pth'
    if restarted and existing.is_file() and not evaluate:
        resume = 'auto'  # the command is that of the first start, and the checkpoint is of this run
    if resume == 'auto':
        resume = str(existing) if existing.is_file() else ''
        if evaluate and not resume:
            raise UserError(f'there is no checkpoint at {existing} to evaluate')
    elif (
        existing.is_file() and not evaluate and not (resume and Path(resume).resolve() == existing.resolve())
    ):
        raise UserError(
            f'{output_dir} holds the checkpoint of a run: add --resume auto to go on with it, or choose '
            'another --output_dir'
        )
    make_folder(output_dir)
    return resume


@contextmanager
def only_run_of(folder: str) -> Iterator[None]:
    """Lock an output folder ('': none) during the block; all ranks enter it.

    Raises:
        UserError: another run holds the lock.
    """
    with ExitStack() as stack:
        with fail_together():
            if folder and is_main_process():
                make_folder(folder)
                stack.enter_context(lock_folder(folder))
                remove_partial_files(folder)
        yield
