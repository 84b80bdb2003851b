"""Several processes for a test, forked from a server that has imported PyTorch to start them quickly."""

import faulthandler
import importlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

# What a run does besides, where main.py has it from: half the time of small ones.
EXTRAS = {
    'plot_curves': 'util.run',
    'contact_sheet': 'util.visualize',
    'sample_detections': 'engine',
    'flops_text': 'models.training.summary',
}
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['torch', 'torch._dynamo', 'main'])


def start(environment: dict[str, str], function: Callable, *args: object) -> multiprocessing.Process:
    """A process of its own that calls `function`, a module's, with these environment variables besides."""
    process = CONTEXT.Process(target=enter, args=(environment, function, *args), daemon=True)
    process.start()
    return process


def enter(environment: dict[str, str], function: Callable, *args: object) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method('fork', force=True)  # of loader workers, as in a run of its own
    multiprocessing.process.current_process()._config['daemon'] = False  # it may have loader workers
    function(*args)


def in_processes(number: int, function: Callable, *args: object, seconds: float = 300) -> list:
    """What function(rank, *args) returns in each of `number` processes of one gloo group.

    AssertionError: one of them fails; with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [start({}, member, Path(folder), rank, number, function, *args) for rank in range(number)]
        for process in processes:
            process.join(seconds)
        running = [process for process in processes if process.is_alive()]
        for process in running:
            process.kill()
        errors = [path.read_text() for path in Path(folder).glob('error*')]
        assert not errors, '\n'.join(errors)
        assert not running, f'{len(running)} of {number} processes have not ended after {seconds} seconds'
        return [torch.load(Path(folder) / f'{rank}.pth', weights_only=False) for rank in range(number)]


def member(folder: Path, rank: int, number: int, function: Callable, *args: object) -> None:
    try:
        dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=number)
        dist.barrier()  # one that ended at once would break off while the others still connect
        torch.save(function(rank, *args), folder / f'{rank}.pth')
        dist.destroy_process_group()
    except BaseException:
        (folder / f'error{rank}').write_text(f'process {rank}: {traceback.format_exc()}')
        raise


def start_main(log: Path, argv: list[str], environment: dict[str, str]) -> multiprocessing.Process:
    """Start `python main.py argv` without EXTRAS in a process; its output is appended to `log`."""
    return start(environment, run_main, str(log), argv)


def print_to(log: str | Path) -> None:
    """What this process prints goes to the end of a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def run_main(log: str, argv: list[str]) -> None:
    print_to(log)
    faulthandler.dump_traceback_later(100)  # where it hangs, if it does
    for name, module in EXTRAS.items():
        setattr(importlib.import_module(module), name, lambda *_: '')
    sys.argv = ['main.py', *argv]
    runpy.run_path(str(Path(__file__).resolve().parents[1] / 'main.py'), run_name='__main__')


def group_environment(number: int) -> list[dict[str, str]]:
    """What a launcher tells each of `number` processes of this machine."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    common = {
        'WORLD_SIZE': str(number),
        'LOCAL_WORLD_SIZE': str(number),
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': port,
    }
    return [common | {'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(number)]


def start_group(log: Path, argv: list[str], number: int = 2) -> list[multiprocessing.Process]:
    """`main.py argv` in so many processes; each has a log of its own, `log` with its number."""
    return [
        start_main(log.with_name(f'{log.name}{rank}'), argv, environment)
        for rank, environment in enumerate(group_environment(number))
    ]


def end_group(processes: list[multiprocessing.Process], seconds: float = 120) -> list[int]:
    """Exit codes, once all have ended. AssertionError: one has not."""
    for process in processes:
        process.join(seconds)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    assert not late, f'{len(late)} processes have not ended after {seconds} seconds'
    return [process.exitcode for process in processes]
