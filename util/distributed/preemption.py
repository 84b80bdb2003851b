"""
Signals that ask a run to stop: all processes agree on the step, the state is saved, and the process ends so that whoever
starts it again goes on there.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from util.distributed.collectives import get_world_size, is_main_process, leave_distributed
from util.distributed.launch import is_preempted

# SIGTERM: torchrun, Slurm and Kubernetes send it before they kill. SIGUSR1, SIGUSR2: time is nearly up (`sbatch
# --signal`, submitit). Where they do not exist (Windows), nothing listens.
SIGNALS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1', 'SIGUSR2') if hasattr(signal, name))
# Who sends one of these does not requeue the job.
NEARLY_OVER = [number for number in SIGNALS if number != signal.SIGTERM]
UNFINISHED = 75  # exit status of a run that was stopped and can go on (EX_TEMPFAIL)


class Interrupted(Exception):
    """The processes have agreed to stop here; args: the number of the signal."""


class StopRequests:
    """Listens to signals from its making until `close`.

    device: where a collective works, that of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.signum = 0
        self.asked: tuple[dist.Work, Tensor, Tensor] | None = None
        self.stream = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self.previous: dict[int, Callable | int | None] = {}
        for number in SIGNALS:
            try:
                self.previous[number] = signal.signal(number, self.note)
            except ValueError:  # not the main thread: somebody else's program, and its signals
                break

    def note(self, signum: int, frame: object) -> None:
        if self.signum not in NEARLY_OVER:  # SIGTERM may come before and after, and says less
            self.signum = signum

    def check(self) -> None:
        """Call it once a step in every process. Raises Interrupted in all of them at the same step, one step after any of
        them has heard a signal: what is asked now is answered by the next call, so that nothing waits.
        """
        if get_world_size() == 1:
            signum = self.signum
        else:
            signum = self.answer()
            self.ask()
        if signum:
            raise Interrupted(signum)

    def ask(self) -> None:
        """Start the exchange of the signal that stands last in SIGNALS; nothing waits for it here."""
        place = SIGNALS.index(self.signum) + 1 if self.signum else 0
        sent = torch.full((1,), place, device=self.device)  # made there: copying would wait
        work = dist.all_reduce(sent, dist.ReduceOp.MAX, async_op=True)
        received = sent
        if self.stream is not None:  # the copy waits for the exchange on a stream of its own
            received = torch.empty(1, dtype=sent.dtype, pin_memory=True)
            with torch.cuda.stream(self.stream):
                work.wait()
                received.copy_(sent, non_blocking=True)
            sent.record_stream(self.stream)
        self.asked = work, sent, received

    def answer(self) -> int:
        """What the last `ask` has brought; 0 without one."""
        if self.asked is None:
            return 0
        work, _, received = self.asked
        self.asked = None
        work.wait() if self.stream is None else self.stream.synchronize()
        return (0, *SIGNALS)[int(received)]

    def close(self) -> None:
        """Signals mean what they meant before. What was asked last is not waited for: another process may have failed."""
        self.asked = None
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.previous = {}

    def leave(self, signum: int) -> None:
        """After the state is saved: pass the signal on to who listened before (submitit requeues its job), and ask Slurm to
        requeue if nobody else will. Then exit with the status UNFINISHED.
        """
        if self.signum in NEARLY_OVER:  # heard while the state was saved
            signum = self.signum
        listener, main = self.previous.get(signum), is_main_process()
        self.close()
        try:
            if callable(listener):
                listener(signum, None)
            alone = signum in NEARLY_OVER and not callable(listener)
            # A preempted job that ends before Slurm takes its place by force counts as done.
            if main and (alone or is_preempted()):
                requeue()
        finally:  # srun --kill-on-bad-exit ends the main process, requeued or not, once another one has left
            if get_world_size() > 1:
                dist.barrier()
            leave_distributed()
        sys.exit(UNFINISHED)


def requeue() -> None:
    if 'SLURM_JOB_ID' in os.environ:
        subprocess.run(['scontrol', 'requeue', os.environ['SLURM_JOB_ID']], check=False)


def was_restarted() -> bool:
    """Whether a launcher has started this job again: torchrun after a failure, Slurm after a requeue."""
    return any(
        int(os.environ.get(name) or 0) > 0 for name in ('TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT')
    )
