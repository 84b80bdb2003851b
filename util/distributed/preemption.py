"""
Signals that ask a run to stop. All ranks agree on the step, the state is saved, and the job is requeued or
started again by its launcher.
"""

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from util.distributed.collectives import get_world_size, init_distributed, is_main_process, leave_distributed
from util.distributed.launch import is_preempted

# SIGTERM: torchrun, Slurm and Kubernetes send it before they kill. SIGUSR1, SIGUSR2: the time limit is near
# (`sbatch --signal`, submitit). SIGINT: Ctrl-C. Windows does not have all of them.
NAMES = ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGUSR2')
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
# The senders of these do not requeue the job.
NEAR_TIME_LIMIT = [number for number in SIGNALS if number not in (signal.SIGINT, signal.SIGTERM)]
UNFINISHED = 75  # exit status of a run that was stopped and can go on (EX_TEMPFAIL)


class Interrupted(SystemExit):
    """All ranks stop at this step, or this rank stops while there is nothing to save."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.code = 128 + signum


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM raise Interrupted at once in a block that waits for a network, after its former handler."""

    def end(signum: int, frame: FrameType | None) -> None:
        if callable(before):
            before(signum, frame)
        raise Interrupted(signum)

    if threading.current_thread() is not threading.main_thread():  # only this one receives signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class StopRequests:
    """Signal handlers that stay installed until `close`.

    device: device of the model, for collectives.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.signum = 0
        self.exchange: tuple[dist.Work, Tensor, Tensor] | None = None
        self.stream = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self.previous: dict[int, Callable | int | None] = {}
        for number in SIGNALS:
            try:
                self.previous[number] = signal.signal(number, self.on_signal)
            except ValueError:  # not the main thread: another program handles its signals
                break

    def on_signal(self, signum: int, frame: object) -> None:
        if signum == signal.SIGINT:
            if self.signum:
                raise KeyboardInterrupt
            if is_main_process():
                print('asked to stop: the run ends after this step; Ctrl-C again ends it at once', flush=True)
        if self.signum not in NEAR_TIME_LIMIT:  # SIGTERM may come before and after them, and is less specific
            self.signum = signum

    def check(self) -> None:
        """Raise Interrupted on all ranks at the same step, if one of them has received a signal.

        Every rank must call it once a step. A call reads the exchange that the call before has started, so
        that no rank waits.
        """
        if get_world_size() == 1:
            signum = self.signum
        else:
            signum = self.finish_exchange()
            self.start_exchange()
        if signum:
            raise Interrupted(signum)

    def start_exchange(self) -> None:
        """Start an all-reduce of the last signal in the order of SIGNALS, without waiting for it."""
        order = SIGNALS.index(self.signum) + 1 if self.signum else 0
        sent = torch.full((1,), order, device=self.device)  # created on the device, since a copy would wait
        work = dist.all_reduce(sent, dist.ReduceOp.MAX, async_op=True)
        received = sent
        if self.stream is not None:  # a separate stream waits for the exchange
            received = torch.empty(1, dtype=sent.dtype, pin_memory=True)
            with torch.cuda.stream(self.stream):
                work.wait()
                received.copy_(sent, non_blocking=True)
            sent.record_stream(self.stream)
        self.exchange = work, sent, received

    def finish_exchange(self) -> int:
        """Return the signal of the last exchange; 0 if there was none."""
        if self.exchange is None:
            return 0
        work, _, received = self.exchange
        self.exchange = None
        work.wait() if self.stream is None else self.stream.synchronize()
        return (0, *SIGNALS)[int(received)]

    def close(self) -> None:
        """Restore the former signal handlers, without waiting for an exchange: a rank may have failed."""
        self.exchange = None
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.previous = {}

    def leave(self, signum: int) -> None:
        """Pass the signal on, and exit with the status UNFINISHED. The state must be saved before.

        The former handler gets the signal (submitit requeues its job). Otherwise Slurm is asked to requeue
        the job if its sender does not.
        """
        if self.signum in NEAR_TIME_LIMIT:  # received while the state was saved
            signum = self.signum
        handler, main = self.previous.get(signum), is_main_process()
        self.close()
        try:
            if callable(handler) and signum != signal.SIGINT:
                handler(signum, None)
            unhandled = signum in NEAR_TIME_LIMIT and not callable(handler)
            # A preempted job that ends before Slurm ends it counts as complete.
            if main and 'SLURM_JOB_ID' in os.environ and (unhandled or is_preempted()):
                subprocess.run(['scontrol', 'requeue', os.environ['SLURM_JOB_ID']], check=False)
        finally:  # srun --kill-on-bad-exit ends the main process, requeued or not, once another one has left
            leave_distributed()
        sys.exit(UNFINISHED)


@contextmanager
def processes(device: torch.device, url: str) -> Iterator[StopRequests]:
    """Join the process group of a run for a block. A signal ends the block after its state is saved.

    url: initialisation method of `torch.distributed`.
    """
    init_distributed(device, url)
    stops, signum = StopRequests(device), 0
    try:
        yield stops
    except Interrupted as stop:
        signum = stop.args[0]
        # Variables of the frames refer to the model, which refers to the group.
        traceback.clear_frames(stop.__traceback__)
    except BaseException:
        stops.close()
        raise
    if signum:
        stops.leave(signum)
    stops.close()
    leave_distributed()


def was_restarted() -> bool:
    """Return whether torchrun (after a failure) or Slurm (after a requeue) has started this job again."""
    return any(
        int(os.environ.get(name) or 0) > 0 for name in ('TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT')
    )
