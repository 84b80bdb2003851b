"""
Progress on the terminal, and `metrics.csv` and `log.jsonl` on disk.

Loss terms stay on the device until they are shown. A read waits for the device, so it happens once per
window, in one copy.
"""

import csv
import io
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from util.distributed.collectives import all_reduce_sum, get_world_size, is_main_process
from util.errors import UserError
from util.files import save_atomically


class Meter:
    """Means of named scalars over an epoch, which are summed on the device and read in windows."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.pending: Tensor | None = None
        self.num_pending = 0
        self.totals: dict[str, float] = {}
        self.device = torch.device('cpu')
        self.count = 0

    def update(self, values: dict[str, Tensor]) -> None:
        """Add scalars, with the same names each time, without waiting for the device."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self.names, self.device = list(values), stacked.device
        self.pending = stacked if self.pending is None else self.pending + stacked
        self.num_pending += 1

    def state_dict(self) -> dict:
        """Return plain values and tensors on the CPU, with those of the current window."""
        pending = None if self.pending is None else self.pending.cpu()
        return {
            'names': self.names,
            'pending': pending,
            'num_pending': self.num_pending,
            'totals': dict(self.totals),
            'count': self.count,
        }

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self.device = device
        if self.pending is not None:
            self.pending = self.pending.to(device)

    def joined(self, other: 'Meter') -> 'Meter':
        """Add the sums of another meter to this one, and end its window."""
        self.read_window()
        other.read_window()
        self.names = self.names or other.names
        self.totals = {name: self.totals.get(name, 0) + other.totals.get(name, 0) for name in self.names}
        self.count += other.count
        return self

    def read_window(self) -> dict[str, float]:
        """Return the means since the last call, with one copy from the device.

        Raises:
            UserError: a mean is not finite.
        """
        if self.pending is None:
            return {}
        sums = dict(zip(self.names, self.pending.tolist(), strict=True))
        window = {name: value / self.num_pending for name, value in sums.items()}
        for name, value in sums.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        self.count += self.num_pending
        self.pending, self.num_pending = None, 0
        broken = [name for name, value in window.items() if not math.isfinite(value)]
        if broken:
            raise UserError(
                f'loss is not finite, stopping training: {", ".join(broken)}. The last checkpoint is '
                'untouched; a lower --lr or --clip_max_norm 0.1 usually helps'
            )
        return window

    def averages(self) -> dict[str, float]:
        """Return the means of the epoch over all ranks."""
        self.read_window()
        totals = torch.tensor([self.totals[name] for name in self.names] + [self.count], dtype=torch.float64)
        if get_world_size() > 1:
            totals = all_reduce_sum(totals.to(self.device)).cpu()
        *sums, count = totals.tolist()
        return {name: value / max(count, 1) for name, value in zip(self.names, sums, strict=True)}


class Progress:
    """Progress bar (tqdm) on a terminal, plain lines otherwise; only the main process shows it.

    every: steps between two reads of the numbers. done: number of steps before the run was interrupted.
    """

    def __init__(self, title: str, total: int, every: int = 10, done: int = 0) -> None:
        self.title, self.total, self.every = title, total, max(every, 1)
        self.first, self.done, self.num_images, self.start = done, done, 0, time.perf_counter()
        self.active = is_main_process()
        on_terminal = self.active and sys.stderr.isatty()
        self.bar = None
        if on_terminal:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=title, dynamic_ncols=True, leave=False, initial=done)

    def step(self, num_images: int, meter: Meter | None = None) -> None:
        """Count a step of `num_images`, and show the meter at the end of a window."""
        self.done += 1
        self.num_images += num_images
        if self.bar is not None:
            self.bar.update()
        if self.done % self.every == 0 or self.done == self.total:
            self.show(meter.read_window() if meter else {})

    def show(self, values: dict[str, float]) -> None:
        terms = ('loss', 'loss_ce', 'loss_bbox', 'loss_giou')
        shown = {name: values[name] for name in terms if name in values}
        text = '  '.join(f'{name.removeprefix("loss_")} {value:.4g}' for name, value in shown.items())
        if self.bar is not None:
            self.bar.set_postfix_str(f'{text}  {self.speed():.3g} img/s')
        elif self.active:
            eta = (time.perf_counter() - self.start) / (self.done - self.first) * (self.total - self.done)
            fields = [f'{self.title}  {self.done:{len(str(self.total))}}/{self.total}', text]
            fields += [f'{self.speed():.3g} img/s', f'ETA {format_time(eta)}', memory_text()]
            print('  '.join(field for field in fields if field), flush=True)

    def speed(self) -> float:
        """Return images per second of all ranks together."""
        return self.num_images * get_world_size() / (time.perf_counter() - self.start)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def print_main(text: str) -> None:
    """Print on the main process."""
    if is_main_process():
        print(text, flush=True)


def memory_text() -> str:
    return f'{torch.cuda.max_memory_allocated() / 2**20:.0f} MB' if torch.cuda.is_available() else ''


def format_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}'


def read_records(path: Path) -> list[dict]:
    """Read a log.jsonl.

    Raises:
        UserError: a line is not JSON; the message names it.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(
                f'{path}, line {number} is not JSON ({error}): correct it, or remove it'
            ) from error
    return records


class RunLog:
    """Log with one row per epoch, counted from 1, which the main process writes.

    `metrics.csv` has only numbers, and is equal for equal runs. `log.jsonl` has all values, also times.

    epochs_done: rows of later epochs are removed, because these epochs will run again.
    """

    def __init__(self, folder: Path, epochs_done: int = 0) -> None:
        self.csv_path, self.jsonl_path = folder / 'metrics.csv', folder / 'log.jsonl'
        rows = csv.DictReader(self.csv_path.read_text().splitlines()) if self.csv_path.is_file() else []
        records = read_records(self.jsonl_path) if self.jsonl_path.is_file() else []
        self.rows: list[dict] = [row for row in rows if int(row['epoch']) <= epochs_done]
        self.records = [record for record in records if record['epoch'] <= epochs_done]

    def has_epoch(self, epoch: int) -> bool:
        return any(int(row['epoch']) == epoch for row in self.rows)

    def values(self, column: str) -> list[float]:
        """Return the values of a column in order, without epochs that have none."""
        return [float(row[column]) for row in self.rows if row.get(column, '') != '']

    def best(self, column: str) -> float:
        """Return the largest value of a column so far; minus infinity if it has no value."""
        return max(self.values(column), default=-math.inf)

    def evaluations_since_best(self, column: str) -> int:
        """Return how many values of a column came after its first largest value."""
        values = self.values(column)
        return len(values) - 1 - values.index(max(values)) if values else 0

    def append(self, row: dict[str, float], record: dict) -> None:
        """Add an epoch. row: numbers. record: JSON values. Both hold `epoch`."""
        self.rows.append(row)
        self.records.append(record)
        if not is_main_process():
            return
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows(self.rows)
        save_atomically(self.csv_path, lambda path: path.write_text(text.getvalue()))
        lines = ''.join(json.dumps(record) + '\n' for record in self.records)
        save_atomically(self.jsonl_path, lambda path: path.write_text(lines))
