"""
Heartbeats between ranks, so that all end within a minute, and say why, if one dies or hangs.

By default the others would wait for half an hour in a collective. Every rank therefore shows that it lives, and
watches one other.
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
LOCAL = '127.0.0.1'
FAILED = 'failed'  # key of the reason, once there is one


def serve(address: str, timeout: timedelta) -> dist.TCPStore:
    """Start the store, which listens on the interface of this address only; by itself it would listen on all."""
    try:
        family, *_, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(place[:2], family=family)
    except OSError:  # the address is that of a gateway, not of an interface
        return dist.TCPStore(address, 0, None, True, timeout, wait_for_workers=False)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


class Heartbeat:
    """Threads that run from `start` to `stop`; in a single process both do nothing.

    Signs of life go through a key-value store in the main process. Each rank watches its right neighbour, so the
    number of messages grows linearly with the number of ranks. Time is counted in a rank's own beats, so a machine
    that was paused does not blame others.
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
        processes = all_gather_object(here)
        alone = machine() is not None and all(each[1] == machine() for each in processes)
        address = LOCAL if alone else os.environ.get('MASTER_ADDR') or processes[0][0]
        if get_rank() == 0:
            self.store = serve(address, timeout)
        port = all_gather_object(self.store.port if self.store else None)[0]
        if get_rank() > 0:
            self.store = dist.TCPStore(address, port, None, False, timeout, wait_for_workers=False)
        self.neighbour = (get_rank() + 1) % get_world_size()
        host, system, pid = processes[self.neighbour]
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
        """End the run if the store does not answer, because `watch` would then wait for ever."""
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
        """Show that this rank lives, and look at its neighbour. Return why the run has failed, or None."""
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
        """Tell the other ranks why this one ends.

        A broken connection is the fault of another rank; this one waits for that rank's own reason.
        """
        if not self.threads:
            return
        if is_connection_error(error):
            self.threads[0].join((self.most_missed + 3) * self.interval)
            return
        self.ended.set()
        text = str(error).splitlines()[0] if str(error) else ''
        self.publish(f'process {get_rank()} on {socket.gethostname()}: {type(error).__name__}: {text}')

    def give_up(self, reason: str) -> None:
        self.publish(reason)
        print(f'error: the run ends, because {reason}', file=sys.stderr, flush=True)
        if get_rank() == 0:
            time.sleep(2 * self.interval)  # the others read the reason from this process
        os._exit(1)

    def publish(self, reason: str) -> None:
        assert self.store is not None
        # The store may have gone with the main process.
        with contextlib.suppress(RuntimeError, dist.DistError):
            self.store.set(FAILED, reason)
        if get_rank() == 0 and self.ended.is_set():
            time.sleep(2 * self.interval)

    def stop(self) -> None:
        """End the heartbeat of a run that succeeded.

        No rank stops its signs of life before all are here. The main process, which has the store, ends last.
        """
        if self.threads:
            dist.barrier()
            self.ended.set()
            for thread in self.threads:
                thread.join()
            dist.barrier()


def is_connection_error(error: BaseException) -> bool:
    """Tell whether a collective has failed, as it does if another rank is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ('gloo', 'NCCL', 'Connection'))
    )


def machine() -> tuple[str, str] | None:
    """Return a value that is equal for processes that see each other's pids (same boot, same pid namespace), or None
    if unknown.
    """
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text()
        return boot, os.readlink('/proc/self/ns/pid')
    except OSError:
        return None


def is_running(pid: int) -> bool:
    """Tell whether a process of this machine is alive; a zombie is not."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] not in 'ZX'
    except FileNotFoundError:
        return False
    except OSError:
        return True
