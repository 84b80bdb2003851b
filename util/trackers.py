"""Trackers of experiments: each is a class in `TRACKERS`, under the flag that asks for it."""

from importlib import import_module
from pathlib import Path
from typing import Protocol

from util.errors import UserError


class Tracker(Protocol):
    """Receives the numbers of each epoch on the main process.

    module, package: what it imports, and the package that has this module.
    """

    module: str
    package: str

    def __init__(self, folder: Path, flags: dict) -> None: ...

    def add(self, epoch: int, numbers: dict[str, float]) -> None:
        """Log the numbers of an epoch, counted from 1: the row of metrics.csv."""


class TensorBoard:
    """Events of TensorBoard in the output folder."""

    module, package = 'torch.utils.tensorboard', 'tensorboard'

    def __init__(self, folder: Path, flags: dict) -> None:
        self.writer = import_module(self.module).SummaryWriter(folder)

    def add(self, epoch: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()


class WandB:
    """A run of Weights & Biases. Its environment variables apply (WANDB_MODE=offline)."""

    module = package = 'wandb'

    def __init__(self, folder: Path, flags: dict) -> None:
        wandb = import_module(self.module)
        try:
            self.run = wandb.init(
                project=flags['wandb'], name=folder.name, dir=folder, config=flags, resume='auto'
            )
        except wandb.Error as error:
            raise UserError(f'--wandb {flags["wandb"]}: {error} Or set WANDB_MODE=offline') from error

    def add(self, epoch: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=epoch)


TRACKERS: dict[str, type[Tracker]] = {'tensorboard': TensorBoard, 'wandb': WandB}


def build_trackers(folder: Path, flags: dict) -> list[Tracker]:
    """Build the trackers that the flags ask for."""
    return [build(folder, flags) for flag, build in TRACKERS.items() if flags[flag]]


def check_trackers(folder: str, flags: dict) -> None:
    """Check the trackers that the flags ask for.

    Raises:
        UserError: a package is not installed, or there is no output folder.
    """
    for flag, tracker in TRACKERS.items():
        if not flags[flag]:
            continue
        try:
            import_module(tracker.module)
        except ImportError as error:
            package = tracker.package
            raise UserError(f'--{flag} needs the package {package}: pip install {package}') from error
        if not folder:
            raise UserError(f'--{flag} writes into --output_dir: give it')
