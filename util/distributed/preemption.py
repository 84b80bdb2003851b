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

# SIGTERM: torchrun, Slurm and Kubernetes send it before they kill. SIGUSR1, SIGUSR2: time is nearly up
# (`sbatch --signal`, submitit). SIGINT: Ctrl-C. Where they do not exist (Windows), nothing listens.
NAMES = ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGUSR2')
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
# Who sends one of these does not requeue the job.
NEARLY_OVER = [number for number in SIGNALS if number not in (signal.SIGINT, signal.SIGTERM)]
UNFINISHED = 75  # exit status of a run that was stopped and can go on (EX_TEMPFAIL)


class Interrupted(SystemExit):
    """All ranks have agreed to stop at this step, or this one stops while nothing is to be saved. Elsewhere
    it ends the program.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.code = 128 + signum


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM raise Interrupted at once in a block that waits for a network, after its former handler has
    heard it.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        if callable(before):
            before(signum, frame)
        raise Interrupted(signum)

    if threading.current_thread() is not threading.main_thread():  # signals come to that one alone
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class StopRequests:
    """Signal handlers that stay installed until `close`.

    device: the model's, where a collective works.
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
            except ValueError:  # not the main thread: somebody else's program, and its signals
                break

    def on_signal(self, signum: int, frame: object) -> None:
        if signum == signal.SIGINT:
            if self.signum:
                raise KeyboardInterrupt
            if is_main_process():
                print('asked to stop: the run ends after this step; Ctrl-C again ends it at once', flush=True)
        if self.signum not in NEARLY_OVER:  # SIGTERM may come before and after, and says less
            self.signum = signum

    def check(self) -> None:
        """Raise Interrupted on all ranks at the same step, if any of them has received a signal. Call it once
        a step on every rank.

        The exchange that one call starts is read by the next one, so that no rank waits.
        """
        if get_world_size() == 1:
            signum = self.signum
        else:
            signum = self.finish_exchange()
            self.start_exchange()
        if signum:
            raise Interrupted(signum)

    def start_exchange(self) -> None:
        """Start an all-reduce of the signal that stands last in SIGNALS, without waiting for it."""
        order = SIGNALS.index(self.signum) + 1 if self.signum else 0
        sent = torch.full((1,), order, device=self.device)  # built there: copying would wait
        work = dist.all_reduce(sent, dist.ReduceOp.MAX, async_op=True)
        received = sent
        if self.stream is not None:  # the copy waits for the exchange on a stream of its own
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
        """Restore the former signal handlers. An exchange in flight is not waited for, because another rank
        may have failed.
        """
        self.exchange = None
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.previous = {}

    def leave(self, signum: int) -> None:
        """Pass the signal on and exit with the status UNFINISHED. Call it after the state is saved.

        The former handler gets the signal (submitit requeues its job). Slurm is asked to requeue if nobody
        else will.
        """
        if self.signum in NEARLY_OVER:  # heard while the state was saved
            signum = self.signum
        listener, main = self.previous.get(signum), is_main_process()
        self.close()
        try:
            if callable(listener) and signum != signal.SIGINT:
                listener(signum, None)
            alone = signum in NEARLY_OVER and not callable(listener)
            # A preempted job that ends before Slurm takes its place by force counts as done.
            if main and (alone or is_preempted()):
                requeue()
        finally:  # srun --kill-on-bad-exit ends the main process, requeued or not, once another one has left
            leave_distributed()
        sys.exit(UNFINISHED)


@contextmanager
def processes(device: torch.device, url: str) -> Iterator[StopRequests]:
    """Join the processes of a run, and leave them at the end; a signal ends the block after its state is
    saved.

    url: where they meet, as `torch.distributed` has it.
    """
    init_distributed(device, url)
    stops, signum = StopRequests(device), 0
    try:
        yield stops
    except Interrupted as stop:
        signum = stop.args[0]
        traceback.clear_frames(stop.__traceback__)  # they hold the model, which holds the group
    except BaseException:
        stops.close()
        raise
    if signum:
        stops.leave(signum)
    stops.close()
    leave_distributed()


def requeue() -> None:
    if 'SLURM_JOB_ID' in os.environ:
        subprocess.run(['scontrol', 'requeue', os.environ['SLURM_JOB_ID']], check=False)


def was_restarted() -> bool:
    """Return whether a launcher has started this job again: torchrun after a failure, Slurm after a requeue."""
    return any(
        int(os.environ.get(name) or 0) > 0 for name in ('TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT')
    )
