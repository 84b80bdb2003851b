"""
When a process dies or hangs, the others wait in a collective for what never comes, for half an hour by default. Here
every process shows that it lives and watches one other, so that all end within a minute, and say why.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from util.distributed.collectives import all_gather_object, get_rank, get_world_size

INTERVAL = 1.0  # seconds between two signs of life
PATIENCE = 40.0  # seconds without one after which a process counts as lost
FAILED = 'failed'  # key of the reason, once there is one


class Heartbeat:
    """Runs in threads from `start` to `stop`; in a single process neither does anything.

    Signs of life go through a key-value store in the main process. Each process watches its right neighbour, so the
    number of messages grows as the number of processes. Time is counted in beats of one's own: a machine that was
    paused blames nobody.
    """

    def __init__(self, interval: float = INTERVAL, patience: float = PATIENCE) -> None:
        self.interval, self.most_missed = interval, patience / interval
        self.ended = threading.Event()
        self.threads: list[threading.Thread] = []
        self.store: dist.TCPStore | None = None
        self.number = 0  # exchanges with the store
        self.seen: bytes | None = None  # last sign of life of the neighbour

    def start(self) -> None:
        if get_world_size() == 1:
            return
        here, timeout = (socket.gethostname(), machine(), os.getpid()), timedelta(seconds=10)
        places = all_gather_object(here)
        if get_rank() == 0:
            self.store = dist.TCPStore('localhost', 0, None, True, timeout, wait_for_workers=False)
        host, port = all_gather_object((here[0], self.store.port if self.store else None))[0]
        if get_rank() > 0:
            same = machine() is not None and machine() == places[0][1]
            name = 'localhost' if same else os.environ.get('MASTER_ADDR') or host
            self.store = dist.TCPStore(name, port, None, False, timeout, wait_for_workers=False)
        self.neighbour = (get_rank() + 1) % get_world_size()
        host, system, pid = places[self.neighbour]
        self.neighbour_pid = pid if system is not None and system == machine() else None
        self.name = f'process {self.neighbour} (pid {pid} on {host})'
        self.threads = [
            threading.Thread(target=target, name='heartbeat', daemon=True)
            for target in (self.watch, self.guard)
        ]
        for thread in self.threads:
            thread.start()

    def watch(self) -> None:
        last, missed = None, 0
        while not self.ended.wait(self.interval):
            self.number += 1
            try:
                reason = self.exchange(self.number)
            except (RuntimeError, dist.DistError):
                self.give_up('the main process (0) has ended')
                return
            missed = 0 if self.seen != last else missed + 1
            last = self.seen
            if reason is None and missed > self.most_missed:
                reason = f'{self.name} has given no sign of life for {missed * self.interval:.0f} seconds'
            if reason is not None and not self.ended.is_set():
                self.give_up(reason)
                return

    def guard(self) -> None:
        """The store may not answer, and let `watch` wait for ever."""
        last, missed = 0, 0
        while not self.ended.wait(self.interval):
            missed = 0 if self.number != last else missed + 1
            last = self.number
            if missed > self.most_missed:
                print(
                    'error: the run ends, because the main process (0) does not answer',
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    def exchange(self, number: int) -> str | None:
        """Show that this process lives, look at its neighbour; returns why the run has failed, if it has."""
        assert self.store is not None
        self.store.set(f'beat{get_rank()}', str(number))
        if self.store.check([FAILED]):
            return self.store.get(FAILED).decode()
        key = f'beat{self.neighbour}'
        self.seen = self.store.get(key) if self.store.check([key]) else None
        if self.neighbour_pid is not None and not is_running(self.neighbour_pid):
            return f'{self.name} has died'
        return None

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends. A broken connection is the trouble of another one, whose own reason is
        waited for.
        """
        if not self.threads:
            return
        if is_connection_error(error):
            self.threads[0].join((self.most_missed + 3) * self.interval)
            return
        self.ended.set()
        text = str(error).splitlines()[0] if str(error) else ''
        self.tell(f'process {get_rank()} on {socket.gethostname()}: {type(error).__name__}: {text}')

    def give_up(self, reason: str) -> None:
        self.tell(reason)
        print(f'error: the run ends, because {reason}', file=sys.stderr, flush=True)
        if get_rank() == 0:
            time.sleep(2 * self.interval)  # the others read the reason from this process
        os._exit(1)

    def tell(self, reason: str) -> None:
        assert self.store is not None
        # The store may have gone with the main process.
        with contextlib.suppress(RuntimeError, dist.DistError):
            self.store.set(FAILED, reason)
        if get_rank() == 0 and self.ended.is_set():
            time.sleep(2 * self.interval)

    def stop(self) -> None:
        """The run ends as it should. Nobody stops giving signs of life before all are here, and the main process, which has
        the store, ends after all.
        """
        if self.threads:
            dist.barrier()
            self.ended.set()
            for thread in self.threads:
                thread.join()
            dist.barrier()


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective has failed, which happens where another process is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ('gloo', 'NCCL', 'Connection'))
    )


def machine() -> tuple[str, str] | None:
    """What is equal for processes that can see each other's pids: one start of a system, one space of pids. None where
    that cannot be told.
    """
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text()
        return boot, os.readlink('/proc/self/ns/pid')
    except OSError:
        return None


def is_running(pid: int) -> bool:
    """Whether a process of this machine is alive; one that has ended and was not waited for is not."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] not in 'ZX'
    except FileNotFoundError:
        return False
    except OSError:
        return True
