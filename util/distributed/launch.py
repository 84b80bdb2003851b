"""
Slurm as a launcher: torchrun's environment variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR, MASTER_PORT) in the tasks of srun, which submitit's tasks are too, and whether a job is
preempted.
"""

import os
import re
import subprocess
from collections.abc import Mapping

from util.errors import UserError

# Above the ports of services, and below those that systems assign themselves (from 32768 on).
FIRST_PORT, NUM_PORTS = 15000, 15000


def export_launcher_environment() -> None:
    """Set missing variables of torchrun in a task of Slurm's srun; do nothing elsewhere.

    Raises:
        UserError: WORLD_SIZE is set, but not to the number of tasks.
    """
    if 'RANK' in os.environ and 'WORLD_SIZE' in os.environ:
        return  # torchrun, perhaps one started by srun on each node
    variables = slurm_task(os.environ)
    if not variables:
        return
    size = os.environ.get('WORLD_SIZE', variables['WORLD_SIZE'])
    if size != variables['WORLD_SIZE']:
        raise UserError(
            f'WORLD_SIZE is {size}, but {variables["WORLD_SIZE"]} tasks were started: unset WORLD_SIZE'
        )
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def slurm_task(environment: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for one of several tasks of a srun, {} for anything else.

    A batch script and the shell of salloc have SLURM_NTASKS too, the former even SLURM_PROCID=0, but they run
    once. Only tasks of a step have SLURM_STEP_NUM_TASKS. Batch scripts submitted from such a task inherit it,
    but there the two numbers differ.
    """
    tasks = environment.get('SLURM_STEP_NUM_TASKS', '1')
    if tasks == '1' or tasks != environment.get('SLURM_NTASKS') or 'SLURM_PROCID' not in environment:
        return {}
    here = environment['SLURM_GTIDS'].split(',')
    nodes = environment.get('SLURM_STEP_NODELIST') or environment['SLURM_JOB_NODELIST']
    # Several steps of one job may run on one machine.
    number = int(environment['SLURM_JOB_ID']) * 10 + int(environment.get('SLURM_STEP_ID', 0))
    return {
        'RANK': environment['SLURM_PROCID'],
        'WORLD_SIZE': tasks,
        'LOCAL_RANK': environment['SLURM_LOCALID'],
        'LOCAL_WORLD_SIZE': str(len(here)),
        # The name of a node may not be that of a host; a single node needs no name.
        'MASTER_ADDR': '127.0.0.1' if str(len(here)) == tasks else first_host(nodes),
        'MASTER_PORT': str(FIRST_PORT + number % NUM_PORTS),
    }


def first_host(nodes: str) -> str:
    """Return the first name in Slurm's short form of a list: gpu-007-ib of `gpu-[007-9,12]-ib,login1`."""
    return re.sub(r'\[([^],-]+)[^]]*\]', r'\1', nodes).split(',')[0]


def is_preempted() -> bool:
    """Return whether Slurm preempts this job for another one, and waits for it to end.

    A job that ends while Slurm waits counts as complete and is not started again, so it must be requeued. A
    cancelled job gets the same SIGTERM, but has another state.
    """
    if 'SLURM_JOB_ID' not in os.environ:
        return False
    command = ['scontrol', '-o', 'show', 'job', os.environ['SLURM_JOB_ID']]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    facts = dict(word.split('=', 1) for word in shown.split() if '=' in word)
    # SIGNALING: still running, the signal is on its way to some of the tasks.
    return facts.get('JobState') in ('RUNNING', 'SIGNALING') and facts.get('PreemptTime', 'None') != 'None'
