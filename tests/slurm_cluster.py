"""
A real Slurm of one machine for tests: slurmctld and slurmd on free ports of the loopback interface, in a
folder of their own. Another Slurm of the machine is neither read nor changed.

A missing Slurm is installed only on request: INSTALL_SLURM=1, as root, with apt-get.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PROGRAMS = ('slurmctld', 'slurmd', 'srun', 'sbatch', 'scontrol')
PACKAGES = ('slurmctld', 'slurmd', 'slurm-client')
INSTALL_SECONDS = 240
# The node claims four CPUs on any machine. Jobs of `urgent` preempt those of `main`, which get the signal
# that they asked for (--signal), have GRACE seconds to end, and start again later.
GRACE = 30
ENDS = ('BOOT_FAIL', 'CANCELLED', 'COMPLETED', 'FAILED', 'NODE_FAIL', 'OUT_OF_MEMORY', 'PREEMPTED', 'TIMEOUT')
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000 Port={node_port} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
# Without accounting nobody answers to sacct, and submitit asks it whether a job that left no result is over.
SACCT = """#!{python}
import subprocess, sys
asked = [word for flag, word in zip(sys.argv, sys.argv[1:]) if flag == '-j']
print('JobID|State|NodeList')
for job in asked:
    shown = subprocess.run(['scontrol', '-o', 'show', 'job', job], capture_output=True, text=True).stdout
    known = dict(word.split('=', 1) for word in shown.split() if '=' in word)
    if known:
        print(known['JobId'], known['JobState'], known.get('NodeList', ''), sep='|')
"""


def install_slurm() -> str | None:
    """Why there is no Slurm to test with; None if there is."""
    if all(map(shutil.which, PROGRAMS)):
        return None
    if os.environ.get('INSTALL_SLURM') != '1':
        return 'Slurm is not installed; INSTALL_SLURM=1 installs it where root has apt-get'
    if os.geteuid() != 0 or not shutil.which('apt-get'):
        return 'INSTALL_SLURM=1 needs root and apt-get'
    deadline = time.monotonic() + INSTALL_SECONDS
    environment = os.environ | {'DEBIAN_FRONTEND': 'noninteractive'}
    for words in (['update', '-qq'], ['install', '-y', '-qq', '--no-install-recommends', *PACKAGES]):
        left = max(deadline - time.monotonic(), 1)
        try:
            subprocess.run(
                ['apt-get', '-o', 'DPkg::Lock::Timeout=60', *words],
                env=environment,
                check=True,
                timeout=left,
                stdout=subprocess.DEVNULL,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            return f'installing Slurm failed: {error}'
    return None if all(map(shutil.which, PROGRAMS)) else f'{PACKAGES} do not hold all of {PROGRAMS}'


class SlurmCluster:
    """Commands and questions to the cluster in `folder`. Every one of them has a time limit in seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM_', 'SBATCH_'))}
        path = f'{folder}/bin{os.pathsep}{os.environ["PATH"]}'
        self.environment |= {'SLURM_CONF': f'{folder}/slurm.conf', 'PATH': path}
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        for name in ('state', 'spool', 'bin'):
            (self.folder / name).mkdir()
        controller_port, node_port = free_ports(2)
        config = CONFIG.format(
            folder=self.folder,
            host=socket.gethostname().split('.')[0],
            user=getpass.getuser(),
            controller_port=controller_port,
            node_port=node_port,
            grace=GRACE,
        )
        (self.folder / 'slurm.conf').write_text(config)
        sacct = self.folder / 'bin/sacct'
        sacct.write_text(SACCT.format(python=sys.executable))
        sacct.chmod(0o755)
        for command in (['slurmctld', '-D', '-c'], ['slurmd', '-D']):
            with (self.folder / f'{command[0]}.log').open('w') as log:
                self._daemons[command[0]] = subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        self.wait_until(
            lambda: self.run('sinfo', '-h', '-o', '%T', check=False) == 'idle', 20, 'an idle node'
        )

    def run(self, *command: str, timeout: float = 20, check: bool = True) -> str:
        """What a command prints. AssertionError: it failed or took too long."""
        try:
            done = subprocess.run(
                command, env=self.environment, timeout=timeout, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f'{command} took longer than {timeout} s: {error.stdout}') from error
        assert not check or done.returncode == 0, (
            f'{command}: {done.returncode}\n{done.stdout}\n{done.stderr}'
        )
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, PreemptTime, ..."""
        shown = self.run('scontrol', '-o', 'show', 'job', job_id)
        return dict(word.split('=', 1) for word in shown.split() if '=' in word)

    def wait_for_state(self, job_id: str, state: str, seconds: float) -> dict[str, str]:
        """Wait for the state of a job, and return the job.

        Raises:
            AssertionError: it ended in another state, or is not in it in time.
        """

        def reached() -> bool:
            found = self.job(job_id)['JobState']
            assert found == state or found not in ENDS, f'job {job_id} is {found}, not {state}'
            return found == state

        self.wait_until(reached, seconds, f'job {job_id} that is {state}')
        return self.job(job_id)

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """AssertionError with the daemons' last words: the condition did not come true in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f'no {what} after {seconds} s\n{self.last_words()}')
            time.sleep(0.1)

    def last_words(self) -> str:
        """The end of what each daemon logged, and the queue."""
        logs = [(name, (self.folder / f'{name}.log').read_text()[-3000:]) for name in self._daemons]
        queue = self.run('squeue', '-l', check=False, timeout=5)
        return '\n'.join(f'--- {name}\n{text}' for name, text in [*logs, ('squeue', queue)])

    def stop(self) -> None:
        """End the jobs, then the daemons; what does not end by itself is killed."""
        with suppress(AssertionError):
            self.run('scancel', '--user', getpass.getuser(), timeout=10)
            self.wait_until(lambda: not self.run('squeue', '-h', timeout=5), 15, 'empty queue')
            self.run('scontrol', 'shutdown', timeout=10)
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait(timeout=10)
        for pid in self.step_daemons():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def step_daemons(self) -> list[int]:
        """Processes of this cluster that outlived it: each has its slurm.conf in the environment."""
        mark, found = f'SLURM_CONF={self.folder}/slurm.conf'.encode(), []
        for path in Path('/proc').glob('[0-9]*'):
            with suppress(OSError):
                if mark in (path / 'environ').read_bytes().split(b'\0'):
                    found.append(int(path.name))
        return found


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A running cluster; skips the test where there is no Slurm."""
    if reason := install_slurm():
        pytest.skip(reason)
    # Not in pytest's own folder, whose name may be too long for Slurm's sockets.
    with tempfile.TemporaryDirectory(prefix='slurm-') as folder:
        cluster = SlurmCluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(('127.0.0.1', 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
