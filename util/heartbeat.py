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

import torch.distributed as dist

from util.dist import all_gather_object, get_rank, get_world_size

INTERVAL = 1.0  # seconds between two signs of life
PATIENCE = 40.0  # seconds without one after which a process counts as lost
FAILED = 'failed'  # key of the reason, once there is one


class Heartbeat:
    """Runs in a thread from `start` to `stop`; in a single process neither does anything.

    Signs of life go through a key-value store in the main process. Each process watches its right neighbour, so the
    number of messages grows as the number of processes.
    """

    def __init__(self, interval: float = INTERVAL, patience: float = PATIENCE) -> None:
        self.interval, self.patience = interval, patience
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None
        self.store: dist.TCPStore | None = None
        self.seen: bytes | None = None  # last sign of life of the neighbour

    def start(self) -> None:
        if get_world_size() == 1:
            return
        host, places = socket.gethostname(), all_gather_object(socket.gethostname())
        main = get_rank() == 0
        timeout = timedelta(seconds=10)
        if main:
            self.store = dist.TCPStore('localhost', 0, None, True, timeout, wait_for_workers=False)
        address = all_gather_object((host, self.store.port) if main else None)[0]
        if not main:
            name = 'localhost' if address[0] == host else os.environ.get('MASTER_ADDR') or address[0]
            self.store = dist.TCPStore(name, address[1], None, False, timeout, wait_for_workers=False)
        self.neighbour = (get_rank() + 1) % get_world_size()
        pids = all_gather_object(os.getpid())
        self.neighbour_pid = pids[self.neighbour] if places[self.neighbour] == host else None
        self.name = f'process {self.neighbour} (pid {pids[self.neighbour]} on {places[self.neighbour]})'
        self.thread = threading.Thread(target=self.watch, name='heartbeat', daemon=True)
        self.thread.start()

    def watch(self) -> None:
        number, last, heard = 0, None, time.monotonic()
        while not self.ended.wait(self.interval):
            number += 1
            try:
                reason = self.exchange(number)
            except (RuntimeError, dist.DistError):
                self.give_up('the main process (0) has ended')
                return
            if self.seen != last:
                last, heard = self.seen, time.monotonic()
            if reason is None and time.monotonic() - heard > self.patience:
                reason = f'{self.name} has given no sign of life for {self.patience:.0f} seconds'
            if reason is not None and not self.ended.is_set():
                self.give_up(reason)
                return

    def exchange(self, number: int) -> str | None:
        """Show that this process lives, look at its neighbour; returns why the run has failed, if it has."""
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
        if self.thread is None:
            return
        if is_connection_error(error):
            self.thread.join(self.patience + 3 * self.interval)
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
        with contextlib.suppress(
            RuntimeError, dist.DistError
        ):  # the store may have gone with the main process
            self.store.set(FAILED, reason)
        if get_rank() == 0 and self.ended.is_set():
            time.sleep(2 * self.interval)

    def stop(self) -> None:
        """The run ends as it should: nobody is missed any more. The store stays until the process ends."""
        if self.thread is not None:
            self.ended.set()
            self.thread.join()
            dist.barrier()


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective has failed, which happens where another process is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ('gloo', 'NCCL', 'Connection'))
    )


def is_running(pid: int) -> bool:
    """Whether a process of this machine is alive; one that has ended and was not waited for is not."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] not in 'ZX'
    except FileNotFoundError:
        return not os.path.isdir('/proc/self')  # other systems have no /proc: the signs of life decide
    except OSError:
        return True
