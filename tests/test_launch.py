"""Launchers: what a process learns from Slurm about its place, and tools/run_dist_launch.sh."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as get_torchrun_parser

from tests.runs import ROOT, TINY, load
from util.distributed.launch import export_launcher_environment, first_host, is_preempted

NAMES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
# As Slurm 22.05 sets them.
BATCH = {
    'SLURM_JOB_ID': '7',
    'SLURM_JOB_NODELIST': 'n[1-2]',
    'SLURM_NTASKS': '4',
    'SLURM_PROCID': '0',
    'SLURM_LOCALID': '0',
    'SLURM_GTIDS': '0',
    'SLURM_NODEID': '0',
}
STEP = {'SLURM_STEP_ID': '1', 'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_STEP_NUM_TASKS': '4'}
TASK = BATCH | STEP | {'SLURM_PROCID': '3', 'SLURM_LOCALID': '1', 'SLURM_GTIDS': '2,3', 'SLURM_NODEID': '1'}


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch):
    """A function from an environment to what is exported in it."""

    def export(environment: dict[str, str]) -> dict[str, str]:
        monkeypatch.setattr(os, 'environ', dict(environment))
        export_launcher_environment()
        return {name: os.environ[name] for name in NAMES if name in os.environ}

    return export


def test_tasks_of_srun_look_like_torchrun(exported) -> None:
    assert exported(TASK) == {
        'RANK': '3',
        'WORLD_SIZE': '4',
        'LOCAL_RANK': '1',
        'LOCAL_WORLD_SIZE': '2',
        'MASTER_ADDR': 'n1',
        'MASTER_PORT': '15071',
    }
    ports = {
        exported(TASK | {'SLURM_JOB_ID': job, 'SLURM_STEP_ID': step})['MASTER_PORT']
        for job in '78'
        for step in '01'
    }
    assert len(ports) == 4, 'jobs and steps that share a machine do not meet'


def test_tasks_of_one_node_need_no_name(exported) -> None:
    here = {'SLURM_STEP_NUM_TASKS': '2', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '1'}
    assert exported(TASK | here)['MASTER_ADDR'] == '127.0.0.1'


@pytest.mark.parametrize(
    'environment',
    [
        {},
        {'SLURM_JOB_ID': '7', 'SLURM_JOB_NODELIST': 'n1', 'SLURM_NTASKS': '4'},
        BATCH,
        BATCH | STEP | {'SLURM_NTASKS': '2'},
        TASK | {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'},
        {'SUBMITIT_EXECUTOR': 'slurm'},
    ],
    ids=['nothing', 'salloc', 'sbatch', 'sbatch called in a task', 'srun --pty bash', 'submitit, one task'],
)
def test_a_process_that_is_alone_stays_so(exported, environment: dict[str, str]) -> None:
    assert exported(environment) == {}


def test_what_is_set_stays(exported) -> None:
    torchrun = {'RANK': '9', 'WORLD_SIZE': '16', 'LOCAL_RANK': '1'}
    assert exported(TASK | torchrun) == torchrun, 'a torchrun on each node'
    own = {'MASTER_ADDR': '10.0.0.1', 'MASTER_PORT': '4711', 'WORLD_SIZE': '4'}
    assert exported(TASK | own).items() >= (own | {'RANK': '3'}).items()
    with pytest.raises(ValueError, match='WORLD_SIZE is 8, but 4 tasks were started'):
        exported(TASK | {'WORLD_SIZE': '8'})


@pytest.mark.parametrize(
    ('nodes', 'first'),
    [
        ('vm', 'vm'),
        ('a1,b2', 'a1'),
        ('n[1-2]', 'n1'),
        ('gpu-[007-9,12]-ib,login1', 'gpu-007-ib'),
        ('n[3,5],m[1-2]', 'n3'),
        ('rack[2-3]node[01-16]', 'rack2node01'),
    ],
)
def test_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ('shown', 'preempted'),
    [
        ('JobState=RUNNING PreemptTime=2026-01-01T00:00:00', True),
        ('JobState=SIGNALING PreemptTime=2026-01-01T00:00:00', True),
        ('JobState=RUNNING PreemptTime=None', False),
        ('JobState=COMPLETING PreemptTime=None', False),
        ('', False),
    ],
    ids=['preempted', 'just preempted', 'time is over', 'cancelled', 'unknown'],
)
def test_preemption_is_told_from_cancellation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str, preempted: bool
) -> None:
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text(f'#!/bin/sh\necho "JobId=$5 {shown}"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv('SLURM_JOB_ID', '7')
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    assert is_preempted() is preempted
    monkeypatch.setenv('PATH', '')
    assert not is_preempted(), 'no Slurm'


def launch(*words: str | Path, seconds: float = 60, **more: str) -> subprocess.CompletedProcess:
    """tools/run_dist_launch.sh with these words and this environment."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    environment = {'PATH': path, 'OMP_NUM_THREADS': '1', 'MASTER_PORT': port, **more}
    return subprocess.run(
        ['tools/run_dist_launch.sh', *map(str, words)],
        cwd=ROOT,
        env=environment,
        timeout=seconds,
        capture_output=True,
        text=True,
    )


def test_run_dist_launch_gives_each_process_its_place(tmp_path: Path) -> None:
    script = tmp_path / 'script.sh'
    script.write_text('echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR $1" > "$2/$RANK"\n')
    done = launch(2, script, '--a b', tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in '01':
        assert (tmp_path / rank).read_text() == f'{rank}/2 {rank}/2 127.0.0.1 --a b\n'


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / 'script.sh'
    script.write_text('[ $RANK = 0 ] && kill -9 $$\nexec sleep 50\n')
    start = time.monotonic()
    assert launch(2, script).returncode != 0
    assert time.monotonic() - start < 40


def test_time_nearly_up_is_for_the_processes(tmp_path: Path) -> None:
    """torchrun hands SIGUSR2 on instead of dying of it."""
    if 'signals_to_handle' not in get_torchrun_parser().format_help():
        pytest.skip('the torchrun of this PyTorch cannot')
    script = tmp_path / 'script.sh'
    script.write_text(
        f'trap "touch {tmp_path}/told$RANK; exit 75" USR2\ntouch {tmp_path}/ready$RANK\n'
        f'while [ ! -e {tmp_path}/ready0 ] || [ ! -e {tmp_path}/ready1 ]; do sleep 0.1; done\n'
        '[ $RANK = 0 ] && kill -USR2 $PPID\nfor i in $(seq 300); do sleep 0.1; done\n'
    )
    assert launch(2, script).returncode != 0
    assert {path.name for path in tmp_path.glob('told*')} == {'told0', 'told1'}


@pytest.mark.parametrize(
    ('words', 'environment', 'message'),
    [
        ((), {}, 'a number of GPUs and a command are needed'),
        (('8',), {}, 'a number of GPUs and a command are needed'),
        (('eight', 'true'), {}, "GPUS must be a positive number, not 'eight'"),
        (('0', 'true'), {}, "GPUS must be a positive number, not '0'"),
        (('2', 'true'), {'GPUS_PER_NODE': '8'}, '2 GPUs are no multiple of GPUS_PER_NODE=8'),
        (('16', 'true'), {'NODE_RANK': '2'}, "NODE_RANK must be less than the 2 nodes, not '2'"),
    ],
)
def test_wrong_calls_of_run_dist_launch(
    words: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    done = launch(*words, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: {message} (usage: ') and done.stderr.count('\n') == 1


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (('main', 'name', '2'), 'a partition, a name, a number of GPUs and a command are needed'),
        (('main', 'name', 'two', 'true'), "GPUS must be a positive number, not 'two'"),
        (('main', 'name', '12', 'true'), '12 GPUs are no multiple of GPUS_PER_NODE=8'),
        (('main', 'name', '2', 'true'), 'there is no Slurm here'),
    ],
)
def test_wrong_calls_of_run_dist_slurm(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    (tmp_path / 'bash').symlink_to('/bin/bash')
    done = subprocess.run(
        ['tools/run_dist_slurm.sh', *words],
        cwd=ROOT,
        env={'PATH': str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: {message} (') and done.stderr.count('\n') == 1


@pytest.mark.exhaustive  # test_faults.py trains by torchrun; above, each process gets its place and its words
@pytest.mark.slow
def test_run_dist_launch_trains(tmp_path: Path) -> None:
    flags = [*TINY.split(), '--batch_size', '2', '--epochs', '1', '--output_dir', tmp_path]
    done = launch(2, 'python', '-u', 'main.py', *flags, seconds=180)
    assert done.returncode == 0, done.stderr
    assert len(load(tmp_path)['rng']) == 2, 'two processes'
