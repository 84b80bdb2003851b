"""Trackers of experiments: each is a class in `TRACKERS`, under the flag that asks for it."""

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from util.errors import UserError


class Tracker(Protocol):
    """A receiver of the numbers of each epoch, on the main process."""

    def __init__(self, folder: Path, flags: dict) -> None: ...

    def add(self, epoch: int, numbers: dict[str, float]) -> None:
        """Take the numbers of an epoch, counted from 1: the row of metrics.csv."""


def import_extra(module: str, package: str, flag: str) -> Any:
    """Import a package that only one flag needs.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f'{flag} needs the package {package}: pip install {package}') from error


class TensorBoard:
    """Events of TensorBoard in the output folder."""

    def __init__(self, folder: Path, flags: dict) -> None:
        self.writer = self.load().SummaryWriter(folder)

    @staticmethod
    def load() -> Any:
        return import_extra('torch.utils.tensorboard', 'tensorboard', '--tensorboard')

    def add(self, epoch: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()


class WandB:
    """A run of Weights & Biases in the project that the flag names; its environment variables apply
    (WANDB_MODE=offline).
    """

    def __init__(self, folder: Path, flags: dict) -> None:
        wandb = self.load()
        try:
            self.run = wandb.init(
                project=flags['wandb'], name=folder.name, dir=folder, config=flags, resume='auto'
            )
        except wandb.Error as error:
            raise UserError(f'--wandb {flags["wandb"]}: {error} Or set WANDB_MODE=offline') from error

    @staticmethod
    def load() -> Any:
        return import_extra('wandb', 'wandb', '--wandb')

    def add(self, epoch: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=epoch)


TRACKERS: dict[str, Any] = {'tensorboard': TensorBoard, 'wandb': WandB}


def build_trackers(folder: Path, flags: dict) -> list[Tracker]:
    """Start the trackers that the flags ask for."""
    return [build(folder, flags) for flag, build in TRACKERS.items() if flags[flag]]


def check_trackers(folder: str, flags: dict) -> None:
    """Refuse trackers without an output folder, or whose package is not installed.

    Raises:
        UserError: it lacks one of these.
    """
    for flag, tracker in TRACKERS.items():
        if flags[flag]:
            tracker.load()
            if not folder:
                raise UserError(f'--{flag} writes into --output_dir: give it')
